"""Pages about runs: one HTML file each, which asks nothing of the network.

From outside: `page` (`write_report`, `report_of`), `gathered`, `charts`, `live` (`Server`), `document` (`html_page`, which the
memory report uses too).

Never: torch, models, trainers; nothing is written but the page.
"""
