"""The tensor axis: which matrices are divided and how (rules.py), and doing it (apply.py)."""
