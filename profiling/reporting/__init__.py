"""Shows what was measured: tables for a terminal, pictures, one HTML file.

From outside: `report` (`print_record`, `format_bytes`), `pictures` (`draw_timeline`, `draw_comparison`), `html.write_html`, and
for pictures of other things `figures` (`blank`, `clean`, `save`).

Never: a number that is not in the record it is given, torch, or pyplot, whose backend and state belong to the caller.
"""
