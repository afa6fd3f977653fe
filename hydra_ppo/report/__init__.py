"""A run as one HTML file that asks nothing of the network, or served on loopback while the run goes on.

From outside: `page` (`write_report`, `report_at_end`), `live` (`serve`), `record` (what a run's folder holds), `charts`
(`number`), and for other pages `style` (`page`, `table`, `text`).

Never: torch, transformers, a library of charts, a request that leaves the page.
"""
