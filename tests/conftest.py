"""Fixtures shared by all tests: everything offline, one thread, fixed seeds, clean processes."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before everything else
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


REPOSITORY = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # two threads on shared cores are slower than one for models this small


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture
def clean_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a fresh process in which some packages cannot be imported.

    `clean_process(code, *arguments, block=("hf_efficient",), timeout=300)` puts the arguments into `sys.argv[1:]`,
    gives the child its own cache of remote code and asserts that it ended well. `block` lists the packages that look
    not installed there.
    """

    def run(
        code: str, *arguments: str | os.PathLike, block: tuple[str, ...] = ("hf_efficient",), timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        prelude = f"import sys\nsys.modules.update(dict.fromkeys({block!r}))\n"  # None = import fails, find_spec too
        for name in block:
            prelude += (
                f"try:\n    import {name}\nexcept ImportError:\n    pass\nelse:\n    sys.exit('{name} is there')\n"
            )
        env = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_MODULES_CACHE": str(tmp_path / "hf_modules")}
        command = [sys.executable, "-I", "-c", prelude + code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=timeout)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def open_browser(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open pages in headless Chromium.

    `open_browser(url, width=1300, height=900, dark=False)` returns a Selenium driver on the page, its viewport exactly
    as wide as asked for; `driver.get_log("browser")` has the console. All are closed afterwards.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next((path for path in map(shutil.which, names) if path), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver on this machine; install the packages chromium, chromium-driver")
    from selenium import webdriver

    drivers = []

    def open_page(url: str, width: int = 1300, height: int = 900, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        profile = f"--user-data-dir={tmp_path / f'profile_{len(drivers)}'}"
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", profile):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
        drivers.append(driver)
        driver.set_page_load_timeout(120)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(url)
        return driver

    yield open_page
    for driver in drivers:
        driver.quit()
