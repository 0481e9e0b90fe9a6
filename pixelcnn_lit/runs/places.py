"""Where the files lie that come with the package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package; in a checkout beside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
WEIGHTS = PACKAGE / "weights"  # those that the package ships with; README.md there tells of each
