"""The repository's shape: what must stay true for imports to work in a checkout, an editable install and a wheel."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("kernels", "formats", "calibration")


@pytest.mark.parametrize("name", LINKS)
def test_root_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "aphroquant" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


def test_kernels_has_no_init_so_that_it_does_not_shadow_the_kernels_package_of_hugging_face() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["formats.base", "calibration", "kernels.reference", "kernels.cpu"])
def test_linked_packages_import_under_the_project_name(module: str) -> None:
    assert importlib.import_module(f"aphroquant.{module}").__name__ == f"aphroquant.{module}"


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from aphroquant.cli import run; assert run(['--help']) == 0; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_public_names_are_what_they_say() -> None:
    import aphroquant

    for name in aphroquant.__all__:
        assert callable(getattr(aphroquant, name)), name
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        aphroquant.convrt  # noqa: B018


def test_a_wheel_holds_every_python_file_and_the_bundled_texts(tmp_path: Path) -> None:
    # The CPU kernels were compiled when the package was installed for these tests: nothing new is learned from them.
    settings = ("cmake.define.AQ_CPU_KERNELS=OFF", f"build-dir={tmp_path / 'build'}")
    options = [f"--config-settings={setting}" for setting in settings]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), *options]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("aphroquant", *LINKS):
        for path in (ROOT / folder).rglob("*.py"):
            if any((ROOT / "aphroquant" / link) in path.parents for link in LINKS):
                continue  # reached through its real folder
            inside = path.relative_to(ROOT).as_posix()
            assert (inside if folder == "aphroquant" else f"aphroquant/{inside}") in names
    for path in (ROOT / "kernels" / "cuda").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".json"):
            assert f"aphroquant/{path.relative_to(ROOT).as_posix()}" in names
    assert "aphroquant/py.typed" in names
    if shutil.which("c++"):  # without a compiler the package has no libraries
        assert any(name.startswith("aphroquant/_lib/libaphroquant_cuda_launcher") for name in names)
    assert any(name.startswith("aphroquant/calibration/default_texts/") for name in names)
