"""Base against tuned: `compare.py` first, then what it measures with (`loss`, `generate`, `text`, `intervals`); `report.py` shows it."""
