"""What a record shows: tables that add up, pictures, one HTML file, and the same of a record saved and loaded."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from hydra_ppo.errors import DataError
from hydra_ppo.profiling.measuring.record import KINDS, PHASES, SHARED, LiveTensor, Peak, Profile, Record, Timeline
from hydra_ppo.profiling.reporting.html import write_html
from hydra_ppo.profiling.reporting.pictures import KIND_COLOURS, draw_comparison, draw_timeline
from hydra_ppo.profiling.reporting.report import (
    comparison_table,
    format_bytes,
    largest_table,
    phase_table,
    print_record,
    role_table,
    summary_line,
)

MIB = 2**20
GIB = 2**30
SAMPLES = 40


def peak(by_role: dict[str, dict[str, int]], largest: list[LiveTensor] = ()) -> Peak:
    return Peak(sum(sum(kinds.values()) for kinds in by_role.values()), by_role, list(largest))


def timeline(changes: int) -> Timeline:
    """Alternate update-actor and update-critic after a rollout, until the phase has changed `changes` times."""
    phases = [("rollout", 0)] + [(PHASES[3 + i % 2], SAMPLES * (i + 1)) for i in range(changes)]
    count = SAMPLES * (changes + 1)
    return Timeline(
        {"base weights": [4 * GIB] * count, "activations": [(i % SAMPLES) * GIB // SAMPLES for i in range(count)]}, phases
    )


def hydra(**changes) -> Profile:
    """Hold 4 + 1 + 0.5 = 5.5 GiB in rollout; 4 + 1/4 + 1/4 + 2 + 1 MiB in update-actor: the peak, 6.5 GiB and 1 MiB."""
    weights = {SHARED: {"base weights": 4 * GIB}}
    storage = LiveTensor(2 * GIB, (8, 1024, 131072), "bfloat16", "activations", "actor", "update-actor", "aten.mm.default")
    phases = {
        "load": peak({SHARED: {"base weights": 4 * GIB, "other": 4 * GIB}}),
        "rollout": peak(weights | {"actor": {"kv cache": GIB, "other": GIB // 2}}),
        "update-actor": peak(
            {
                SHARED: {"base weights": 4 * GIB, "experience": MIB},
                "actor": {"adapters": GIB // 4, "gradients": GIB // 4, "activations": 2 * GIB},
            },
            [storage, replace(storage, bytes=GIB // 4, shape=(), kind="gradients")],
        ),
    }
    profile = Profile(
        method="hydra",
        settings={"model.name_or_path": "tiny", "microbatch_size": 4, "roles": ["actor", "critic"]},
        simulated=True,
        device="cpu",
        static_bytes=4 * GIB + GIB // 4,
        floor_bytes=5 * GIB,
        phases=phases,
        timeline=timeline(5),
    )
    return replace(profile, **changes)


def full(**changes) -> Profile:
    """Hold 26 GiB and 4 MiB at the peak: 4 times that of hydra."""
    phases = {"rollout": peak({"actor": {"base weights": 20 * GIB}, "critic": {"base weights": 6 * GIB, "heads": 4 * MIB}})}
    return replace(hydra(), method="full", phases=phases, static_bytes=20 * GIB, floor_bytes=26 * GIB, **changes)


def record(*profiles: Profile) -> Record:
    return Record(list(profiles), {"python": "3.11.0", "torch": "2.11.0"})


def render(table, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table, crop=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def printed(shown: Record, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    print_record(shown, console)
    return console.file.getvalue()


def cells(table) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]


def headers(table) -> list[str]:
    return [str(column.header).replace("\n", "") for column in table.columns]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 KiB"), (512, "0.5 KiB"), (MIB - 1, "1,024.0 KiB"), (MIB, "1.0 MiB"), (int(6.3 * GIB), "6.3 GiB")],
)
def test_bytes_are_shown_in_the_largest_unit_they_fill(size, text):
    assert format_bytes(size) == text


def test_phase_table_as_printed():
    expected = """\
hydra, simulated: peak of each phase, GiB
┏━━━━━━━━━━━━━━┳━━━━━━┳━━━━━━━━━┳━━━━━━━━━┓
┃              ┃      ┃         ┃ update- ┃
┃              ┃      ┃         ┃   actor ┃
┃ kind         ┃ load ┃ rollout ┃  (peak) ┃
┡━━━━━━━━━━━━━━╇━━━━━━╇━━━━━━━━━╇━━━━━━━━━┩
│ base weights │ 4.00 │    4.00 │    4.00 │
│ adapters     │    0 │       0 │    0.25 │
│ gradients    │    0 │       0 │    0.25 │
│ kv cache     │    0 │    1.00 │       0 │
│ activations  │    0 │       0 │    2.00 │
│ experience   │    0 │       0 │   <0.01 │
│ other        │ 4.00 │    0.50 │       0 │
├──────────────┼──────┼─────────┼─────────┤
│ total        │ 8.00 │    5.50 │    6.50 │
└──────────────┴──────┴─────────┴─────────┘"""
    assert render(phase_table(hydra())) == expected


def test_comparison_table_as_printed():
    # 26 GiB / 6.5 GiB = 4, with the 4 MiB and the 1 MiB too; 6.5 / 5 = 1.3.
    expected = """\
Memory of one PPO step, simulated, GiB
┏━━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━┓
┃ method ┃ static ┃ floor ┃  peak ┃ phase of the peak ┃ peak / floor ┃ x smaller than full ┃
┡━━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━┩
│ full   │  20.00 │ 26.00 │ 26.00 │ rollout           │         1.00 │                1.00 │
│ hydra  │   4.25 │  5.00 │  6.50 │ update-actor      │         1.30 │                4.00 │
└────────┴────────┴───────┴───────┴───────────────────┴──────────────┴─────────────────────┘"""
    assert render(comparison_table([full(), hydra()])) == expected


def test_columns_without_a_value_are_left_out():
    assert "x smaller than full" not in headers(comparison_table([hydra()]))
    assert not {"source", "responses per second"} & set(headers(comparison_table([full(), hydra()])))
    measured = hydra(simulated=False, device="cuda", responses_per_second=3.21)
    table = comparison_table([full(), measured])
    assert cells(table)[0][headers(table).index("responses per second")] == "-"
    assert cells(table)[1][headers(table).index("responses per second")] == "3.21"
    assert [row[headers(table).index("source")] for row in cells(table)] == ["simulated", "measured on cuda"]


def test_a_method_that_trains_nothing_has_no_ratio_to_its_floor():
    table = comparison_table([full(), hydra(floor_bytes=0)])
    assert [row[headers(table).index("peak / floor")] for row in cells(table)] == ["1.00", "-"]


def test_totals_equal_the_sum_of_what_is_above_them():
    # Whole MiB, so the two decimals of every cell are exact and text can be added up.
    sizes = {kind: (i + 1) * MIB for i, kind in enumerate(KINDS)}
    by_role = {"actor": sizes, "critic": {kind: 2 * size for kind, size in sizes.items()}}
    profile = hydra(phases={"rollout": peak({"actor": sizes}), "score": peak(by_role)})
    for table in (phase_table(profile), role_table(profile)):
        *rows, total = cells(table)
        assert total[0] == "total"
        for column in range(1, len(total)):
            assert float(total[column]) == sum(float(row[column]) for row in rows)
    assert cells(phase_table(profile))[-1][1:] == ["91.00", "273.00"]  # 1 + ... + 13 = 91, and three times that
    assert [row[-1] for row in cells(role_table(profile))] == ["91.00", "182.00", "273.00"]
    assert headers(role_table(profile)) == ["role", *KINDS, "total"]


@pytest.mark.parametrize("table", [phase_table, role_table, largest_table])
def test_kinds_that_do_not_add_up_are_refused(table):
    broken = {"rollout": Peak(5 * MIB, {"actor": {"adapters": 4 * MIB}})}
    with pytest.raises(DataError, match="bytes=5242880 of hydra, rollout, is not the sum of its kinds, 4194304"):
        table(hydra(phases=broken))
    with pytest.raises(DataError, match="kind=adaptors of hydra, rollout, is not one of"):
        table(hydra(phases={"rollout": peak({"actor": {"adaptors": 1}})}))


def test_allocator_follows_the_totals_and_sets_the_unit():
    allocator = {"rollout": {"max_memory_allocated": 3 * MIB, "max_memory_reserved": 2 * GIB}}
    phases = {"rollout": peak({"actor": {"adapters": 256 * MIB}}), "score": peak({"actor": {"adapters": 512 * MIB}})}
    rows = cells(phase_table(hydra(phases=phases, allocator=allocator)))
    assert rows == [
        ["adapters", "0.25", "0.50"],
        ["total", "0.25", "0.50"],
        ["allocator: allocated", "<0.01", "-"],
        ["allocator: reserved", "2.00", "-"],
    ]


def test_largest_storages():
    assert cells(largest_table(hydra())) == [
        ["2.00", "8 x 1024 x 131072", "bfloat16", "activations", "actor", "update-actor", "aten.mm.default"],
        ["0.25", "scalar", "bfloat16", "gradients", "actor", "update-actor", "aten.mm.default"],
    ]
    assert len(cells(largest_table(hydra(), count=1))) == 1
    assert cells(largest_table(hydra(), "rollout")) == []
    with pytest.raises(DataError, match=r"phase=score was not measured for hydra; choose one of load, rollout, update-actor\."):
        largest_table(hydra(), "score")


def test_summary_names_peak_floor_and_source():
    assert summary_line(hydra(simulated=False, device="cuda", responses_per_second=2.5)) == (
        "hydra, measured on cuda: peak 6.5 GiB in update-actor, 1.30 times the floor of 5.0 GiB; static 4.2 GiB; "
        "2.50 responses/s."
    )


def test_what_is_printed_of_one_method_and_of_several():
    one, two = printed(record(hydra())), printed(record(full(), hydra()))
    assert "roles at the peak" in one
    assert "Memory of one PPO step" not in one
    assert "roles at the peak" not in two
    assert two.count("simulated: peak of") == 2
    assert "Memory of one PPO step" in two


def test_a_narrow_console_cuts_no_word_or_number():
    for shown in (record(hydra()), record(full(), hydra(simulated=False, device="cuda"))):
        wide, narrow = (set(re.findall(r"[\w.<-]+", printed(shown, width))) for width in (200, 30))
        assert "…" not in printed(shown, 30)
        assert wide <= narrow


def test_markup_in_data_is_text():
    assert "[red]tiny[/red]" in printed(record(hydra(method="[red]tiny[/red]")))


def test_nothing_to_show():
    for show in (comparison_table, lambda profiles: draw_comparison(profiles, Path("never.png"))):
        with pytest.raises(DataError, match=r"profiles=\[\] leaves nothing to .*; measure at least one method"):
            show([])


def test_every_kind_has_a_colour_of_its_own():
    assert set(KIND_COLOURS) == set(KINDS)
    assert len(set(KIND_COLOURS.values())) == len(KINDS)


@pytest.mark.parametrize("changes", [0, 5, 60])
def test_timeline_picture(changes, tmp_path):
    path = tmp_path / "new" / "timeline.png"
    assert draw_timeline(hydra(timeline=timeline(changes)), path) == path
    height, width, _ = imread(path).shape
    assert (width, height) == (1200, 720)  # 8 x 4.8 inches at 150 dots


def test_timeline_picture_shows_the_kinds_in_their_colours(tmp_path):
    image = imread(draw_timeline(hydra(), tmp_path / "timeline.png"))[..., :3]
    shown = {kind: (abs(image - rgb(colour)).max(axis=-1) < 1 / 255).sum() for kind, colour in KIND_COLOURS.items()}
    legend = 2_000  # pixels, more than a legend entry has
    assert {kind for kind, count in shown.items() if count > legend} == {"base weights", "activations"}
    assert shown["base weights"] > 5 * shown["activations"]  # 4 GiB always, against half a GiB on average


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def test_timeline_picture_needs_a_timeline(tmp_path):
    with pytest.raises(DataError, match=r"timeline=None for hydra, and .*; measure again"):
        draw_timeline(hydra(timeline=None), tmp_path / "timeline.png")


def test_comparison_picture_grows_with_the_methods(tmp_path):
    heights = []
    for count in (1, 5):
        path = tmp_path / f"{count}.png"
        assert draw_comparison([full(), *[hydra()] * 4][:count], path) == path
        height, width, _ = imread(path).shape
        assert width == 1200
        heights.append(height)
    assert 200 < heights[0] < heights[1] < 1200


def test_html_is_self_contained(tmp_path):
    path = tmp_path / "new" / "report.html"
    shown = record(full(), hydra(simulated=False, device="cuda"), hydra(method="lora", timeline=None))
    assert write_html(shown, path) == path
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r"src=(.{23})", page)
    assert sources == ['"data:image/png;base64,'] * 3  # the comparison and two timelines
    assert "default-src 'none'; img-src data:" in page
    assert "<strong>Simulated: full, lora.</strong>" in page
    assert "<strong>Measured on cuda: hydra.</strong>" in page
    for text in ("microbatch_size", "2.11.0", "largest storages", "8 x 1024 x 131072", "6.50", "prefers-color-scheme: dark"):
        assert text in page


def test_html_escapes_data(tmp_path):
    attack = '<script>alert("x")</script>'
    storage = LiveTensor(1, (1,), attack, "adapters", attack, attack, attack)
    profile = hydra(
        method=attack,
        simulated=False,
        device=attack,
        settings={attack: attack, "list": [attack]},
        phases={attack: peak({attack: {"adapters": GIB}}, [storage])},
        timeline=Timeline({"adapters": [GIB]}, [(attack, 0)]),
    )
    page = write_html(Record([profile], {attack: attack}), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert '"x")' not in page
    assert page.count("&lt;script&gt;") >= 12


def test_settings_that_differ_get_a_column_each(tmp_path):
    plain, path = hydra(timeline=None), tmp_path / "report.html"
    page = write_html(record(plain, replace(plain, settings={"adapter": None})), path).read_text(encoding="utf-8")
    assert "<td>microbatch_size</td><td>4</td><td>-</td>" in page
    assert "<td>adapter</td><td>-</td><td>null</td>" in page
    same = write_html(record(plain, plain), path).read_text(encoding="utf-8")
    assert "<td>microbatch_size</td><td>4</td></tr>" in same


def test_a_loaded_record_is_shown_as_the_measured_one(tmp_path):
    allocator = {"rollout": {"max_memory_allocated": 3 * MIB, "max_memory_reserved": 2 * GIB}}
    measured = record(full(), hydra(simulated=False, device="cuda", responses_per_second=1 / 3, allocator=allocator))
    measured.save(tmp_path / "new" / "record.json")
    loaded = Record.load(tmp_path / "new" / "record.json")
    assert loaded == measured
    assert printed(loaded) == printed(measured)
    pages = [write_html(shown, tmp_path / name).read_bytes() for name, shown in (("a", measured), ("b", loaded))]
    assert pages[0] == pages[1]


def test_tuples_in_settings_read_the_same_after_loading(tmp_path):
    measured = record(hydra(settings={"betas": (0.9, 0.95)}, timeline=None))
    measured.save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    pages = [write_html(shown, tmp_path / name).read_bytes() for name, shown in (("a", measured), ("b", loaded))]
    assert pages[0] == pages[1]


def corrupt(text: str, how: str) -> str:
    data = json.loads(text)
    if how == "truncated":
        return text[: len(text) // 2]
    if how == "other format":
        return json.dumps(data | {"format": 0})
    if how == "no profiles":
        del data["profiles"]
    elif how == "no bytes":
        del data["profiles"][0]["phases"]["rollout"]["bytes"]
    elif how == "unknown field":
        data["profiles"][0]["speed"] = 1
    elif how == "list":
        data = [data]
    return json.dumps(data)


@pytest.mark.parametrize("how", ["truncated", "other format", "no profiles", "no bytes", "unknown field", "list"])
def test_corrupted_record_is_refused(how, tmp_path):
    path = tmp_path / "record.json"
    record(hydra()).save(path)
    path.write_text(corrupt(path.read_text(), how))
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*measure again"):
        Record.load(path)


def test_missing_and_binary_records_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file or directory; name a file that hydra-ppo profile wrote"):
        Record.load(tmp_path / "none.json")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match="not a record of hydra-ppo profile"):
        Record.load(tmp_path / "picture.json")
