"""A Hydra main that answers a user's mistake with one line and exit code 1."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pixelcnn_lit.build import check
from pixelcnn_lit.errors import explain

_PACKAGE = Path(__file__).parent
# In a wheel conf/ lies inside the package; in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def command(config_name: str) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Decorate a function into the command that conf/<config_name>.yaml configures.

    The top-level keys of the config, as plain values, are the function's arguments; its annotations are their types.
    A job that fails leaves error.txt in its run directory. `debug=true` or HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
            job = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(
                functools.wraps(function)(functools.partial(_run, function, debug))
            )
            try:
                with patch.dict(os.environ, HYDRA_FULL_ERROR="1"):  # makes Hydra raise, not print and exit
                    job()
            except Exception as error:
                line = explain(error)
                if debug or line is None:
                    raise
                sys.exit(f"error: {line}")

        return main

    return decorate


def run_dir() -> Path:
    """The directory of the job that runs: `run_dir`, or a numbered one inside it in a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def shown(path: Path | str) -> str:
    """A path as it is printed: from the folder the user stands in."""
    return os.path.relpath(path)


def _run(function: Callable[..., None], debug: bool, cfg: DictConfig) -> None:
    (run_dir() / "error.txt").unlink(missing_ok=True)
    try:
        config: dict[str, Any] = OmegaConf.to_container(  # pyright: ignore[reportAssignmentType]
            cfg, resolve=True, throw_on_missing=True
        )
        settings = {key: value for key, value in config.items() if key not in ("run_dir", "debug")}
        check("", function, settings)
        function(**settings)
    except Exception as error:
        line = explain(error)
        (run_dir() / "error.txt").write_text((line or repr(error)) + "\n")
        if debug or cfg.debug or line is None or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # a fault of the program shows its traceback; a sweep goes on with its next job
        sys.exit(f"error: {line}")
