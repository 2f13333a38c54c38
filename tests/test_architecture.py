"""The house: which way imports point, who may know whom, what is imported before it is needed, and old names."""

import ast
import importlib
import subprocess
import sys

import pytest

from common.moved import MOVED
from tests.imports import ROOT, arrows, cycle, imports, modules, room_of
from tests.toy import algorithms

# From left to right: a room imports only from rooms to its right. What the author of an algorithm reads is flat.
ORDER = [
    *("examples", "benchmarks", "ALGORITHMS"),
    *("common.evaluation", "common.merge", "common.check_model", "common.samples", "common.start", "common.cli"),
    *("common.presets", "common.serve"),
    *(
        "common.trainer",
        "common.frozen",
        "common.runs",
        "common.embedded",
        "common.tasks",
        "common.sampling",
        "common.rewards",
    ),
    *("common.memory", "common.data", "common.update", "common.models", "common.refill"),
    *("common.logprobs", "common.packing", "common.sequences", "common.packed_attention", "common.sharding"),
    *("common.losses", "common.advantages"),
    *("common.remarks", "common.rollouts", "common.seeds", "common.config", "common.foreign_names"),
    *("common.values", "common.mistakes", "common.moved", "common.environment", "common.caches", "common.host"),
    *("common.yaml_files", "common.others", "common.terminal", "common.signals", "common.processes"),
]
# What an algorithm's folder may import besides itself. models: to bring a model of its own; tasks: the type Task.
FOR_ALGORITHMS = {
    *("common.trainer", "common.config", "common.rollouts", "common.advantages", "common.losses", "common.logprobs"),
    *(
        "common.packing",
        "common.sequences",
        "common.seeds",
        "common.start",
        "common.update.learner",
        "common.sampling.protocol",
        "common.tasks",
    ),
    *("common.models.loading", "common.models.weights", "common.models.saving"),
    *("common.models.configs", "common.models.files"),
}
# Packages that take a second or more to import, and are needed by some runs or commands only.
HEAVY = {"peft", "trl", "vllm", "datasets", "pyarrow", "matplotlib", "bitsandbytes", "wandb"}


def place(room: str) -> int:
    return ORDER.index("ALGORITHMS" if room in algorithms() else room)


def test_imports_point_one_way_between_rooms():
    wrong = {(room, other) for room, others in arrows().items() for other in others if place(room) >= place(other)}
    # Examples build on algorithms' folders, and so do benchmarks; folders never on each other.
    assert not wrong
    assert not cycle(arrows())


def test_a_circle_would_be_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_of_a_package_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    for each in imports():
        if room_of(each.module) == room_of(each.imported) and each.module != each.imported:
            graph.setdefault(each.module, set()).add(each.imported)
    assert not cycle(graph)


def test_algorithms_import_only_what_their_author_reads():
    wrong = [
        each
        for each in imports()
        if each.module.split(".")[0] in algorithms()
        and each.imported.split(".")[0] != each.module.split(".")[0]
        and each.imported not in FOR_ALGORITHMS
    ]
    assert not wrong


def imported_packages(module: str, *, at_the_top: bool) -> set[str]:
    """The packages from outside that a module imports."""
    tree = ast.parse(modules()[module].read_text())
    nodes = tree.body if at_the_top else list(ast.walk(tree))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in named}


def test_only_the_engine_imports_vllm():
    found = {module for module in modules() if "vllm" in imported_packages(module, at_the_top=False)}
    files = ("engine", "startup", "reload", "support", "corrections", "drawing", "group")
    files += ("server", "server_worker", "transfer")
    core = {f"common.sampling.vllm_{name}" for name in files}
    assert core <= found <= core | {"benchmarks.generation", "examples.pipeline.pipeline"}


def test_only_the_room_of_the_embedded_policies_knows_them():
    inside = ("common.embedded", "examples", "benchmarks")
    assert not [
        each for each in imports() if each.imported == "common.embedded.policy" and not each.module.startswith(inside)
    ]
    for module, path in modules().items():
        if module.startswith("common") and not module.startswith(("common.embedded", "common.evaluation.settings")):
            values = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            assert "tiny" not in values, module


def test_models_know_no_task_and_the_command_line_no_trainer():
    graph = arrows()
    assert "common.tasks" not in graph["common.models"]
    assert "common.trainer" not in graph["common.cli"]
    assert "common.evaluation" not in graph["common.trainer"] | graph["common.runs"]


@pytest.mark.parametrize("module", [name for name in modules() if name.split(".")[0] in {"common", *algorithms()}])
def test_nothing_heavy_is_imported_before_it_is_needed(module):
    assert not imported_packages(module, at_the_top=True) & HEAVY


@pytest.mark.parametrize(
    "package", [name for name, path in modules().items() if path.stem == "__init__" and name.startswith("common.")]
)
def test_a_package_begins_with_its_public_names_and_nothing_else(package):
    for node in ast.parse(modules()[package].read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_list = isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        assert is_docstring or is_list or isinstance(node, ast.ImportFrom), ast.unparse(node)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import common.samples.command, common.cli", "torch transformers accelerate trl"),
        ("import common.merge", "accelerate peft trl vllm datasets transformers.models.auto"),
        ("import GRPO.grpo", "peft trl vllm datasets matplotlib transformers.models.auto sympy pyarrow"),
    ],
    ids=["samples", "merge", "a script"],
)
def test_a_mistyped_setting_and_help_cost_no_import_that_they_do_not_need(statement, absent):
    code = f"import sys; {statement}; print(*[name for name in {absent.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_the_check_of_a_model_imports_that_model_alone(tiny_folder):
    """Asking transformers' Auto classes for all of their classes takes five seconds."""
    code = (
        f"import sys; from common.embedded import check_model; check_model({str(tiny_folder)!r}); "
        "print(*[name for name in sys.modules if name.split('.')[-1].startswith('modeling_')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    models = {name for name in done.stdout.split() if name.startswith("transformers.models.")}
    assert {name for name in models if ".auto." not in name} == {"transformers.models.qwen2.modeling_qwen2"}


# Old names


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [(old, new, name) for old, places in MOVED.items() for new, names in places.items() for name in names.split()],
)
def test_a_name_that_moved_is_at_its_new_place_and_whoever_looks_at_the_old_one_is_told(old, new, name):
    parts = new.split(".")
    for cut in range(len(parts), 0, -1):  # a place may be the new name of what was renamed
        if ".".join(parts[:cut]) in modules():
            found = importlib.import_module(".".join(parts[:cut]))
            break
    for part in parts[cut:]:
        found = vars(found)[part]
    assert cut < len(parts) or name in vars(found)
    with pytest.raises(ImportError, match=rf"{name}\b.* in {new}"):
        exec(f"from {old} import {name}", {})


def test_a_module_that_moved_is_named_with_its_new_place():
    with pytest.raises(ModuleNotFoundError, match=r"no common.tiny any more.*common.embedded.policy"):
        importlib.import_module("common.tiny")


def test_a_name_that_never_was_is_answered_as_python_does():
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from common.models import nonsense", {})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'common.nonsense'"):
        importlib.import_module("common.nonsense")
