"""How the methods get into mergekit: start-up files, import hook, switches, failures.

Each test runs fresh Python processes, in environments made for it: a venv that sees this
environment's packages, but not this project, which is then installed into it or not.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from mergekit_dare.cli import COMMANDS
from tests import zoo
from tests.running import PROJECT, dare, merge_yaml, write

pytestmark = pytest.mark.slow

SITE = Path(sysconfig.get_paths()["purelib"])
WHO = "import mergekit.merge_methods as m; print(m.get('dare_ties').spec.pretty_name)"
OURS = "DARE-TIES (mergekit-dare "
BUILT_IN = "DARE TIES\n"


class Environment:
    """A virtual environment; ``packages`` are seen as this environment's, without this project."""

    def __init__(self, folder: Path, packages: Path | None) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (self.site,) = folder.glob("[Ll]ib/**/site-packages")
        if packages is not None:
            (self.site / "packages.pth").write_text(f"{packages}\n")
        self.pristine = self.files()

    def files(self) -> set[str]:
        found = (str(path.relative_to(self.site)) for path in self.site.rglob("*"))
        return {name for name in found if "__pycache__" not in name}

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr

    def install(self, *what: str) -> None:
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *what)

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(self, *arguments: str, check: bool = True, **variables: str) -> tuple[str, str]:
        """Run Python and return what it printed and what it said on stderr."""
        result = subprocess.run(
            [self.python, *arguments],
            env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"}
            | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert not check or result.returncode == 0, result.stderr
        return result.stdout, result.stderr

    def code(self, code: str, **variables: str) -> tuple[str, str]:
        return self.run("-c", code, check=True, **variables)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to all packages of this environment except this project."""
    folder = tmp_path_factory.mktemp("packages")
    for path in SITE.iterdir():
        if "mergekit_dare" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, PROJECT], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, packages: Path, wheel: Path) -> Environment:
    """An environment with the wheel installed; tests leave it as it is."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv", packages)
    environment.install(str(wheel))
    return environment


@pytest.fixture(scope="session")
def without(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Environment:
    """An environment with mergekit, but without this project; tests leave it as it is."""
    return Environment(tmp_path_factory.mktemp("without") / "venv", packages)


@pytest.mark.parametrize("kind", ["folder", "editable", "wheel"])
def test_install_use_uninstall(kind: str, packages: Path, wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", packages)
    assert environment.code(WHO) == (BUILT_IN, "")
    what = {"folder": [str(PROJECT)], "editable": ["-e", str(PROJECT)], "wheel": [str(wheel)]}
    environment.install(*what[kind])
    assert {"mergekit_dare.pth", "mergekit_dare.start"} < environment.files()
    printed, said = environment.code(WHO)
    assert printed.startswith(OURS)
    assert said == ""
    environment.pip("uninstall", "-y", "mergekit-dare")
    assert environment.files() == environment.pristine
    assert environment.code(WHO) == (BUILT_IN, "")


def test_wheel_has_what_it_needs_and_no_more(installed: Environment) -> None:
    new = {name.split("/")[0] for name in installed.files() - installed.pristine}
    assert {name for name in new if not name.endswith(".dist-info")} == {
        "mergekit_dare",
        "mergekit_dare.pth",
        "mergekit_dare.start",
    }
    assert (installed.site / "mergekit_dare" / "py.typed").exists()
    assert not (installed.site / "mergekit_dare" / "plugin" / "startup").exists()


def test_startup_imports_next_to_nothing(installed: Environment, without: Environment) -> None:
    """No torch, no mergekit, and nothing that Python itself has not imported already."""
    modules = "import sys; print('\\n'.join(sys.modules))"
    with_us = set(installed.code(modules)[0].split())
    assert with_us - set(without.code(modules)[0].split()) == {
        "mergekit_dare",
        "mergekit_dare.plugin",
        "mergekit_dare.plugin.autoload",
    }


def test_importing_the_package_imports_neither_torch_nor_mergekit(installed: Environment) -> None:
    code = "import sys, mergekit_dare; print({'torch', 'mergekit'} & set(sys.modules))"
    assert installed.code(code)[0] == "set()\n"


def test_a_real_merge_is_ours(installed: Environment, llamas: Path, tmp_path: Path) -> None:
    config = dare(llamas, seed=4)
    expected = merge_yaml(config, tmp_path / "expected")
    path = write(config, tmp_path / "config.yml")
    run = ["-m", "mergekit.scripts.run_yaml", path]
    (tmp_path / "sitecustomize.py").write_text(TYPEGUARD)
    for out, path_of_hook in (("out", ""), ("hooked", str(tmp_path))):
        installed.run(*run, str(tmp_path / out), PYTHONPATH=path_of_hook)
        assert OURS in (tmp_path / out / "README.md").read_text()
        zoo.assert_same_tensors(zoo.load(tmp_path / out), expected)

    installed.run(*run, str(tmp_path / "off"), MERGEKIT_DARE="0")
    card = (tmp_path / "off" / "README.md").read_text()
    assert "[DARE TIES](" in card
    name = "model.layers.0.mlp.up_proj.weight"
    assert not zoo.load(tmp_path / "off")[name].equal(expected[name])


@pytest.mark.parametrize("value", ["false", "No", "off"])
def test_values_that_switch_off(value: str, installed: Environment) -> None:
    assert installed.code(WHO, MERGEKIT_DARE=value) == (BUILT_IN, "")


def test_switched_off(installed: Environment) -> None:
    assert installed.code(WHO, MERGEKIT_DARE="0") == (BUILT_IN, "")
    finders = "import sys; print([type(f).__name__ for f in sys.meta_path])"
    assert "_HostFinder" not in installed.code(finders, MERGEKIT_DARE="0")[0]
    code = f"import mergekit_dare; print(mergekit_dare.register()); {WHO}"
    printed, said = installed.code(code, MERGEKIT_DARE="0")
    assert printed == f"False\n{BUILT_IN}"
    assert said.count("\n") == 1
    assert "switched off by MERGEKIT_DARE" in said


def test_switched_on(installed: Environment) -> None:
    assert installed.code(WHO, MERGEKIT_DARE="1")[0].startswith(OURS)


@pytest.mark.parametrize(
    "first",
    [
        "import mergekit_dare.plugin.methods",
        "from mergekit_dare.plugin.methods import dare_ties",
        "import mergekit_dare.kernel.merging",
        "import mergekit.config",
        "import mergekit.merge_methods.registry",
        "from mergekit.scripts import run_yaml",
        "import mergekit_dare; assert mergekit_dare.register()",
        "import mergekit_dare; assert mergekit_dare.register() and mergekit_dare.register()",
        "import mergekit_dare.plugin.autoload as a; a.install(); a.install()",
    ],
)
def test_whatever_is_imported_first(first: str, installed: Environment) -> None:
    printed, said = installed.code(f"{first}; {WHO}")
    assert printed.startswith(OURS)
    assert said == ""


INTERRUPTED = """
import os, signal, sys, threading, time
def interrupt():
    while 'mergekit.merge_methods' not in sys.modules: time.sleep(.0005)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try: import mergekit.merge_methods
except KeyboardInterrupt: print('interrupted')
"""
FORGOTTEN = """
import sys, mergekit.merge_methods
for name in [n for n in sys.modules if n.split('.')[0] == 'mergekit']: del sys.modules[name]
"""
TYPEGUARD = """
import sys; from importlib.machinery import PathFinder
class Finder:
    def find_spec(self, name, path=None, target=None):
        is_theirs = name.split('.')[0] == 'mergekit'
        return PathFinder.find_spec(name, path, target) if is_theirs else None
sys.meta_path.insert(0, Finder())
"""
SLIPCOVER = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path[1:])
        return next(filter(None, specs), None)
sys.meta_path.insert(0, Finder())
"""
LAZY = """
import importlib.util, sys
spec = importlib.util.find_spec('mergekit.merge_methods')
spec.loader = importlib.util.LazyLoader(spec.loader)
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
import colorsys
assert 'mergekit.merge_methods.base' not in sys.modules
"""
ZIPPED = f"""
import mergekit, pathlib, shutil, sys, tempfile
site = pathlib.Path(mergekit.__file__).parent.parent
sys.path.insert(0, shutil.make_archive(tempfile.mkdtemp() + '/mergekit', 'zip', site, 'mergekit'))
{FORGOTTEN}
import mergekit.merge_methods
assert '.zip' in mergekit.merge_methods.__file__
"""
IMPORT_AND_ANOTHER = "import mergekit.merge_methods, colorsys\n"


@pytest.mark.parametrize(
    "first",
    [
        INTERRUPTED,
        FORGOTTEN,
        "import importlib.util; importlib.util.find_spec('mergekit.merge_methods')\n",
        "import importlib, mergekit.merge_methods as m; importlib.reload(m)\n",
        f"{TYPEGUARD}{IMPORT_AND_ANOTHER}",
        f"{TYPEGUARD}{FORGOTTEN}{IMPORT_AND_ANOTHER}",
        SLIPCOVER,
        LAZY,
        ZIPPED,
    ],
)
def test_the_hook_is_not_lost(first: str, installed: Environment) -> None:
    """Not by Ctrl-C, a look-up, forgetting, reloading, other hooks and loaders."""
    printed, said = installed.code(f"{first}\n{WHO}\nimport torch\n{MERGED}")
    assert printed.splitlines()[-2].startswith(OURS)
    assert printed.splitlines()[-1] == "1.0"
    assert "mergekit-dare" not in said  # on a slow machine, Numba says that it compiles
    assert first != INTERRUPTED or "interrupted" in printed


@pytest.mark.parametrize(
    "module", ["None", "types.ModuleType('mergekit.merge_methods')", "unittest.mock.MagicMock()"]
)
def test_what_merely_bears_the_name_is_left_alone(module: str, installed: Environment) -> None:
    code = f"import sys, types, unittest.mock; sys.modules['mergekit.merge_methods'] = {module}\n"
    assert installed.code(f"{code}import colorsys") == ("", "")


def test_a_mergekit_without_modules_can_be_imported(installed: Environment, tmp_path: Path) -> None:
    """As an uninstalled one may leave behind: Python has no loader for a folder alone."""
    (tmp_path / "mergekit" / "merge_methods").mkdir(parents=True)
    (tmp_path / "mergekit" / "__init__.py").touch()
    installed.code("import mergekit.merge_methods, colorsys", PYTHONPATH=str(tmp_path))


MERGED = """
b = torch.zeros(1)
print(m.merge_tensors([b, b + 1], 'dare_ties', parameters={'weight': [1.0]}, base_index=0).item())
"""


def test_the_host_module_is_as_it_was(installed: Environment) -> None:
    code = (
        "import inspect, mergekit.merge_methods as m; "
        "print(m.__spec__.loader is m.__loader__, type(m.__loader__).__name__, "
        "'registered_methods' in inspect.getsource(m))"
    )
    assert installed.code(code)[0] == "True SourceFileLoader True\n"


def test_worker_processes(installed: Environment) -> None:
    (installed.folder / "spawn.py").write_text(
        "import multiprocessing\n"
        "def who(_):\n"
        "    import mergekit.merge_methods as m\n"
        "    return m.get('dare_linear').spec.pretty_name\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(who, [0]))\n"
    )
    assert "mergekit-dare" in installed.run("spawn.py")[0]


def test_a_folder_on_pythonpath(without: Environment, llamas: Path, tmp_path: Path) -> None:
    """Start-up files do not run there: ``register`` and ``python -m mergekit_dare`` serve."""
    path = str(PROJECT)
    assert without.code(WHO, PYTHONPATH=path) == (BUILT_IN, "")
    code = f"{WHO}; import mergekit_dare; print(mergekit_dare.register()); {WHO}"
    printed = without.code(code, PYTHONPATH=path)[0]
    assert printed.startswith(f"{BUILT_IN}True\n{OURS}")

    config = {
        "merge_method": "dare_linear",
        "base_model": str(llamas / "base"),
        "models": [{"model": str(llamas / "a"), "parameters": {"weight": 1, "density": 0.5}}],
    }
    config_path = write(config, tmp_path / "config.yml")
    out = tmp_path / "out"
    without.run("-m", "mergekit_dare", "yaml", config_path, str(out), "--quiet", PYTHONPATH=path)
    assert "(mergekit-dare " in (out / "README.md").read_text()


def test_usage_of_the_module(installed: Environment) -> None:
    for arguments in ([], ["nonsense"], ["--help"]):
        text = "".join(installed.run("-m", "mergekit_dare", *arguments, check=False))
        assert text.startswith("usage: python -m mergekit_dare COMMAND ARGUMENTS...\n")
        assert "\n  yaml, multi, pytorch: mergekit-yaml, " in text
        assert "\n  by-name, check, doctor, explain, inspect, suggest, verify: those of " in text


HELP_OF_ALL = """
from mergekit_dare import __main__, cli
for name in cli.COMMANDS:
    try: __main__.main([name, "--help"])
    except SystemExit as left: assert left.code == 0
"""


def test_our_own_commands_by_the_module(without: Environment, llamas: Path, tmp_path: Path) -> None:
    """Each does there what it does as a program, with our methods, and names itself rightly."""
    path = str(PROJECT)
    said = without.code(HELP_OF_ALL, PYTHONPATH=path)[0]
    for name in COMMANDS:
        assert f"Usage: python -m mergekit_dare {name} " in said
    config = write(dare(llamas, seed=4), tmp_path / "config.yml")
    run = ("-m", "mergekit_dare")
    assert without.run(*run, "check", "--files", config, PYTHONPATH=path)[0] == (
        "No problems found.\n"
    )
    out = str(tmp_path / "out")
    without.run(*run, "by-name", config, out, "--quiet", PYTHONPATH=path)
    assert without.run(*run, "verify", out, PYTHONPATH=path)[0].startswith("Identical to the byte")
    printed, _ = without.run(*run, "doctor", check=False, PYTHONPATH=path)
    assert "OFF start-up file: none: this copy was not installed by pip" in printed
    assert "    Use: python -m mergekit_dare yaml CONFIG OUT\n" in printed


def test_the_doctor_on_a_start_up_file_of_an_earlier_layout(packages: Path, tmp_path: Path) -> None:
    """As in a project's folder after ``git pull``; what the doctor advises mends it."""
    environment = Environment(tmp_path / "venv", packages)
    environment.install("-e", str(PROJECT))
    (environment.site / "mergekit_dare.pth").write_text("import mergekit_dare.autoload\n")
    doctor = ("-m", "mergekit_dare", "doctor")
    printed, _ = environment.run(*doctor, check=False)
    assert "mergekit_dare.pth is of another version than the code\n" in printed
    assert f"    Run this in {PROJECT}: pip install -e .\n" in printed
    assert "OFF this interpreter: dare_linear and dare_ties from mergekit itself\n" in printed
    environment.install("-e", str(PROJECT))
    printed, _ = environment.run(*doctor, check=False)
    assert printed.count("OFF ") == 1  # the packages of this environment bring no mergekit-yaml
    assert "OFF mergekit-yaml: neither on the PATH nor beside this Python\n" in printed


def test_without_mergekit(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", packages=None)
    environment.install(str(wheel))
    assert environment.code("pass") == ("", "")
    code = "try:\n import mergekit\nexcept ModuleNotFoundError as error: print(error)"
    assert environment.code(code) == ("No module named 'mergekit'\n", "")


def fake_mergekit(environment: Environment, version: str, registry: str) -> None:
    package = environment.site / "mergekit" / "merge_methods"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("from mergekit.merge_methods import registry\n")
    (package / "registry.py").write_text(registry)
    metadata = environment.site / f"mergekit-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: mergekit\nVersion: {version}\n"
    )


@pytest.mark.parametrize(
    ("version", "registry", "reason"),
    [
        ("0.1.4", "_METHODS = {}", "mergekit 0.1.4 is too old; upgrade with: pip install"),
        ("0.0.9.dev1", "", "mergekit 0.0.9.dev1 is too old"),
        (
            "0.9.0",
            "METHODS = {}",
            "mergekit 0.9.0 keeps its methods where mergekit-dare cannot find them",
        ),
    ],
)
def test_an_incompatible_mergekit(
    version: str, registry: str, reason: str, wheel: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv", packages=None)
    environment.install(str(wheel))
    fake_mergekit(environment, version, registry)
    assert environment.code("pass") == ("", "")
    import_twice = "import mergekit.merge_methods; import mergekit.merge_methods.registry, colorsys"
    printed, said = environment.code(import_twice)
    assert printed == ""
    assert said.count("\n") == 1
    assert said.startswith("mergekit-dare is not active, so mergekit's own DARE methods stay in")
    assert reason in said
    environment.run("-W", "error", "-c", import_twice)


def test_a_method_that_cannot_be_loaded(wheel: Path, tmp_path: Path) -> None:
    """Here without torch: two sentences, and mergekit still works."""
    environment = Environment(tmp_path / "venv", packages=None)
    environment.install(str(wheel))
    fake_mergekit(environment, "0.1.5", "_METHODS = {}")
    printed, said = environment.code("import mergekit.merge_methods; print('works')")
    assert printed == "works\n"
    assert said.count("could not register the merge method") == 2
    assert "dare_linear from mergekit_dare.plugin.methods:dare_linear: ModuleNotFoundError" in said


def test_entry_points_of_other_packages(packages: Path, wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", packages)
    environment.install(str(wheel))
    (environment.site / "other.py").write_text(
        "from mergekit.merge_methods import TensorGroup, merge_method\n"
        "import torch\n"
        "@merge_method(name='first')\n"
        "def first(group: TensorGroup) -> torch.Tensor:\n"
        "    return group.entries[0].tensor\n"
    )
    (environment.site / "leaving.py").write_text("raise SystemExit('no license')\n")
    metadata = environment.site / "other-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[mergekit.merge_methods]\n"
        "first = other:first\n"
        "wrong_name = other:first\n"
        "missing = nowhere:method\n"
        "dare_ties = other:first\n"  # ours keep their names
        "leaves = leaving:method\n"
    )
    printed, said = environment.code(f"{WHO}; print(m.get('first').spec.name)")
    assert printed.startswith(OURS)
    assert printed.endswith("first\n")
    lines = sorted(said.splitlines())
    assert len(lines) == 3
    assert "leaves from leaving:method: SystemExit: no license" in lines[0]
    assert "missing from nowhere:method: ModuleNotFoundError" in lines[1]
    assert "wrong_name from other:first: ValueError: the method's own name is 'first'" in lines[2]


def test_the_example_of_a_method_of_ones_own(
    packages: Path, wheel: Path, tmp_path: Path, llamas: Path
) -> None:
    """A package installed as its README says, and used by mergekit-yaml."""
    environment = Environment(tmp_path / "venv", packages)
    environment.install(str(wheel), str(PROJECT / "examples" / "own_method"))
    models = [{"model": str(llamas / name)} for name in "abc"]
    config = {"merge_method": "median", "models": models, "parameters": {"quantile": 0.5}}
    path = write(config, tmp_path / "median.yml")
    out = tmp_path / "out"
    environment.run("-m", "mergekit.scripts.run_yaml", path, str(out), "--quiet")
    merged = zoo.load(out)
    tensors = [zoo.load(llamas / name) for name in "abc"]
    name = "model.layers.0.mlp.up_proj.weight"
    expected = torch.stack([model[name].float() for model in tensors]).median(0).values
    assert torch.equal(merged[name].float(), expected)
    assert "Median" in (out / "README.md").read_text()


def test_an_earlier_layout_is_upgraded_in_place(
    packages: Path, wheel: Path, tmp_path: Path
) -> None:
    """An installed version whose modules lay flat, and whose start-up line was another."""
    environment = Environment(tmp_path / "venv", packages)
    info = "mergekit_dare-0.0.9.dist-info"
    files = {
        "mergekit_dare/__init__.py": "",
        "mergekit_dare/autoload.py": "def install(): raise RuntimeError('the old one')",
        "mergekit_dare.pth": "import mergekit_dare.autoload; mergekit_dare.autoload.install()",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mergekit-dare\nVersion: 0.0.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": (
            "[mergekit.merge_methods]\ndare_ties = mergekit_dare.methods:dare_ties\n"
        ),
    }
    old = tmp_path / "mergekit_dare-0.0.9-py3-none-any.whl"
    with zipfile.ZipFile(old, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in [*files, f"{info}/RECORD"]))
    environment.install(str(old))
    assert "the old one" in environment.code("pass")[1]
    environment.install("--upgrade", str(wheel))
    printed, said = environment.code(WHO)
    assert printed.startswith(OURS)
    assert said == ""
    assert not {name for name in environment.files() if "autoload" in name} - {
        "mergekit_dare/plugin/autoload.py"
    }
