"""The directory listing is the architecture: who may import whom, what imports no torch, how fast help comes."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import captioner

PACKAGE = Path(captioner.__file__).parent
LEVELS = {
    -2: ["errors", "loops", "penn_treebank", "grammar"],
    -1: ["content_splits", "images", "text_files"],
    0: [
        "caption_formats",
        "tokens",
        "attention",
        "search",
        "checkpoint",
        "cache_folder",
        "fonts",
        "order",
        "output_files",
        "precision",
    ],
    1: [
        "annotation_files",
        "study",
        "image_stream",
        "region_files",
        "metrics",
        "results",
        "vocabulary",
        "encoders",
        "bridges",
        "decoders",
        "decoding",
        "scenes",
        "annotation_cache",
        "cache_listing",
        "checkpoint_files",
        "finiteness",
    ],
    2: ["model", "objectives", "datamodule", "evaluation", "caption_files", "attention_health", "dataset_check"],
    3: [
        "self_critical",
        "ensemble",
        "overlay",
        "faithfulness",
        "report",
        "study_results",
        "check_command",
        "resumption",
    ],
    4: ["task", "fast_captioner", "overlay_page"],
    5: ["model_card", "caption_command", "app_page", "validation_pictures", "interruption", "run_folder"],
    6: ["training", "study_table", "overlay_command", "app"],
    7: ["demo", "study_runs", "app_command"],
    8: ["cli"],
    9: ["__init__"],
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}


def module_of(file):
    """The part of the layout a file belongs to: a module, or a package as a whole."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file):
    """Every module of captioner that a file imports, inside functions and for typing too, with its line."""
    package = ["captioner", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "captioner" and name != "captioner.__version__":
                part = [*name.split("."), "__init__"][1]
                yield part if part in LEVEL else "__init__", node.lineno


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_level():
    assert {module_of(file) for file in FILES} == set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_downward(file):
    own = module_of(file)
    assert own in LEVEL, f"{own} has no level yet"
    upward = [
        f"{file.name}:{line} imports {part} (level {LEVEL[part]}) from level {LEVEL[own]}"
        for part, line in imports_of(file)
        if part != own and LEVEL[part] >= LEVEL[own]
    ]
    assert not upward, upward


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".errors",
        ".annotation_files",
        ".caption_formats",
        ".content_splits",
        ".text_files",
        ".tokens",
        ".images",
        ".image_stream",
        ".metrics",
        ".results",
        ".evaluation",
        ".decoding",
        ".scenes",
        ".study",
        ".cache_listing",
        ".cli",
        ".caption_files",
        ".caption_command",
        ".check_command",
        ".fonts",
        ".overlay_command",
        ".app_command",
    ],
)
def test_what_needs_no_torch_does_not_import_it(module):
    result = python(f"import sys, captioner{module}; assert not {{'torch', 'lightning'}} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_help_answers_at_once():
    def seconds():
        start = time.perf_counter()
        result = python("from captioner.cli import main; main(['--help'])")
        assert result.returncode == 0 and "caption" in result.stdout, result.stderr
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_public_names():
    assert captioner.Preprocessing(size=96).size == 96
    for name in captioner.__all__:
        assert getattr(captioner, name).__name__ == name
    assert set(captioner.__all__) <= set(dir(captioner))
    assert captioner.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = captioner.no_such_name
