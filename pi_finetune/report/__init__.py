"""From run folders to tables, statistics, plots and one self-contained HTML page."""
