"""`hydra-ppo report`: one page of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra_ppo.cli.parser import Parser
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError
from hydra_ppo.report.gathered import gather_all
from hydra_ppo.report.live import Server
from hydra_ppo.report.page import content, report_of, write_report
from hydra_ppo.runs.contents import REPORT
from hydra_ppo.runs.inspect import inspect_run


def report(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo report`, and do it."""
    parser = Parser("report", "Write one HTML page of runs: curves, alarms, samples before and after, settings, how to go on.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=local_path, help="Run folders of sft or ppo.")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help=f"Page to write; default RUN/{REPORT}, of several runs {REPORT} here."
    )
    parser.add_argument(
        "--live", type=int, metavar="PORT", help="Serve it to this machine instead, fresh; 0 takes a free port."
    )
    options = parser.parse_args(arguments)
    if options.live is not None and options.output is not None:
        raise ConfigError("--live serves the page and --output writes it; leave one out.")
    for run in options.runs:
        inspect_run(run)  # what is no run is known before anything is written or served
    if options.live is None:
        default = options.runs[0] / REPORT if len(options.runs) == 1 else Path(REPORT)
        print(f"Wrote {write_report(options.runs, options.output or default)}")
    else:
        serve(options.runs, options.live)


def serve(runs: Sequence[Path], port: int) -> None:
    """Serve the page until Ctrl-C."""

    def inside() -> str:
        return content(gather_all(runs))

    with Server(port, lambda: report_of(runs, is_live=True), inside) as server:
        print(f"{server.address} shows {', '.join(str(run) for run in runs)}; Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Ended.")
