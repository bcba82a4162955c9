"""The report as one HTML page that needs no network: `report.html` beside `report.json`."""
