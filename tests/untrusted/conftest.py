import sys
from pathlib import Path

# The mutations and their watchdog are a tool; worker processes are given this path too.
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
