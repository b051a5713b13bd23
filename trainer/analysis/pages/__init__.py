"""Self-contained HTML pages: elements, charts, and the report of runs."""
