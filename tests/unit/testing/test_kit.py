"""The kit passes a correct plugin, and of a wrong one fails exactly the test that is about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from bittern.records import LeafRule
from bittern.registry import ClassTable, Registry

# Tests that start processes; a mistake that is not about them does without.
SLOW = "not imports_fast and not cuda and not unpatched and not fresh_process and not two_processes"


def test_a_correct_plugin_passes_everything(run_kit: Any) -> None:
    outcomes = run_kit()

    assert outcomes.failed() == set()
    found = {name.rpartition("::")[2].partition("[")[0] for name in outcomes.by_test}
    assert len(found) >= 35
    skipped = [name for name, outcome in outcomes.by_test.items() if outcome == "skipped"]
    assert skipped == []


def test_what_a_plugin_fixes_up_after_conversion_is_restored(run_kit: Any) -> None:
    """Regression: `bittern.restore` did not call ``after_convert``."""
    hook = (
        "@hookimpl\ndef after_convert(model, plan):\n    for path in plan.modules:\n"
        "        model.get_submodule(path).boost = 2.0\n\n\n"
    )
    start = "@hookimpl\ndef register_modules():"
    outcomes = run_kit(
        "-k",
        "fresh_process or is_close",
        changes={
            "hooks": (start, hook + start),
            "quantized": ("* self.gain", "* self.gain * (self.boost / 2)"),
        },
    )

    assert outcomes.failed() == set()
    assert len(outcomes.by_test) == 2


def test_a_class_that_no_other_process_can_import_is_restored_in_this_one(run_kit: Any) -> None:
    outcomes = run_kit(
        "-k",
        "fresh_process or two_processes",
        tests="""
import plover, torch
from bittern.testing import ModuleCase, ModuleConformance

def make():
    class TestModules(ModuleConformance):
        plugin = "plover"
        cases = [ModuleCase("scaled", make=lambda: plover.Scaled(16, 8),
                            inputs=lambda g: (torch.randn(4, 16, generator=g),))]
    return TestModules

TestModules = make()
""",
    )

    assert sorted(outcomes.by_test.values()) == ["passed", "skipped"]


@dataclass(frozen=True)
class Mistake:
    """One wrong line, and the standard tests that must notice it."""

    what: str
    group: str
    file: str
    old: str
    new: str
    noticed_by: set[str]
    select: str = SLOW
    requires: tuple[str, ...] = field(default=())


HOOKS_START = "from bittern.hooks import hookimpl\n"
MISTAKES = [
    # --- the plugin
    Mistake(
        "imports its framework",
        "TestPlugin",
        "hooks",
        HOOKS_START,
        HOOKS_START + "import plover\n",
        {"test_hooks_module_imports_no_framework"},
    ),
    Mistake(
        "imports its framework in a register hook",
        "TestPlugin",
        "hooks",
        "def register_trace_leaves():\n",
        "def register_trace_leaves():\n    import plover\n",
        {"test_register_hooks_import_no_framework"},
    ),
    Mistake(
        "is slow to import",
        "TestPlugin",
        "hooks",
        HOOKS_START,
        HOOKS_START + "import time\ntime.sleep(0.25)\n",
        {"test_hooks_module_imports_fast"},
        "imports_fast or loaded",
    ),
    Mistake(
        "patches torch",
        "TestPlugin",
        "quantized",
        'PROBED = "bittern/testing/probe" in sys.argv[0]\n',
        'if "bittern/testing/probe" in sys.argv[0]:\n    nn.Linear.forward = lambda s, x: x\n',
        {"test_import_leaves_torch_unpatched"},
        "unpatched or cuda or loaded",
    ),
    Mistake(
        "asks for an argument that does not exist",
        "TestPlugin",
        "hooks",
        "def register_symbols():",
        "def register_symbols(model):",
        {"test_hook_implementations_fit_their_specs", "test_plugin_is_loaded"},
        "fit_their_specs or loaded or blocking",
    ),
    Mistake(
        "implements a hook that does not exist",
        "TestPlugin",
        "hooks",
        "def register_symbols():",
        "def register_symbol():",
        {"test_hook_implementations_fit_their_specs", "test_plugin_is_loaded"},
    ),
    Mistake(
        "registers something else each time",
        "TestPlugin",
        "hooks",
        'return [LeafRule(target="plover.layers:Scaled", reason="it is one kernel")]',
        "register_symbols.calls = getattr(register_symbols, 'calls', 0) + 1\n"
        '    return [LeafRule(target="plover.layers:Scaled", reason=f"{register_symbols.calls}")]',
        {"test_register_hooks_are_pure"},
    ),
    Mistake(
        "returns a record of the wrong type",
        "TestPlugin",
        "hooks",
        'return [OpRule(op="aten.linear.default", flow="bittern_plover.rest:flow")]',
        'return [LeafRule(target="plover.layers:Scaled", reason="x")]',
        {"test_register_hooks_return_their_records"},
        "return_their_records or pure or loaded",
    ),
    Mistake(
        "targets a re-export",
        "TestPlugin",
        "hooks",
        'LeafRule(target="plover.layers:Scaled"',
        'LeafRule(target="plover:Scaled"',
        {"test_targets_resolve"},
    ),
    Mistake(
        "names a function that does not exist",
        "TestPlugin",
        "hooks",
        "bittern_plover.rest:flow",
        "bittern_plover.rest:flaw",
        {"test_import_strings_resolve"},
    ),
    Mistake(
        "has a quantized class that is none",
        "TestPlugin",
        "quantized",
        "class QuantScaled(QuantModule, Scaled):",
        "class QuantScaled(Scaled):",
        {"test_quantized_classes_are_quant_modules"},
    ),
    Mistake(
        "has a codec that is none",
        "TestPlugin",
        "rest",
        "class codec(IntCodec):\n    pass",
        "def codec(bits):\n    return bits",
        {"test_codec_factories_give_codecs"},
    ),
    Mistake(
        "has an exporter that takes too little",
        "TestPlugin",
        "rest",
        "def write(model, path, context):\n",
        "def write(model, path, *, context=None):\n",
        {"test_functions_take_what_they_are_given"},
    ),
    Mistake(
        "quarrels with itself",
        "TestPlugin",
        "hooks",
        'return [LeafRule(target="plover.layers:Scaled", reason="it is one kernel")]',
        'return [LeafRule(target="plover.layers:Scaled", reason=r) for r in ("a", "b")]',
        {"test_records_do_not_conflict"},
    ),
    Mistake(
        "replaces a format of core",
        "TestPlugin",
        "hooks",
        'name="plover6"',
        'name="int8"',
        {"test_names_do_not_shadow_core", "test_recipes_are_whole"},
    ),
    Mistake(
        "ships a recipe with an unknown format",
        "TestPlugin",
        "hooks",
        '"weight": "plover6"',
        '"weight": "plover7"',
        {"test_recipes_are_whole"},
    ),
    Mistake(
        "has a command without help",
        "TestPlugin",
        "hooks",
        'click.Command("plover", help="Say hello.")',
        'click.Command("plover")',
        {"test_commands_have_help"},
    ),
    Mistake(
        "replaces a command",
        "TestPlugin",
        "hooks",
        'click.Command("plover", help="Say hello.")',
        'click.Command("plan", help="Say hello.")',
        {"test_commands_replace_none"},
    ),
    Mistake(
        "depends on its framework",
        "TestPlugin",
        "hooks",
        "import click\n",
        "import click  # as before\n",
        {"test_framework_is_an_optional_extra"},
        requires=("plover>=1",),
    ),
    # --- modules
    Mistake(
        "ignores what a quantizer says",
        "TestModules",
        "quantized",
        'x = self.quantize("input", x)',
        'self.quantize("input", x)',
        {"test_every_slot_has_an_effect"},
    ),
    Mistake(
        "computes in another order",
        "TestModules",
        "quantized",
        "y = nn.functional.linear(x, weight) * self.gain",
        "y = nn.functional.linear(x, weight * self.gain[:, None])",
        {
            "test_without_quantizers_it_computes_the_original",
            "test_gradients_without_quantizers_are_the_originals",
        },
    ),
    Mistake(
        "loses the gradient of a parameter",
        "TestModules",
        "quantized",
        "* self.gain",
        "* self.gain.detach()",
        {
            "test_gradients_reach_weights_and_inputs",
            "test_gradients_without_quantizers_are_the_originals",
        },
    ),
    Mistake(
        "is far off when quantized",
        "TestModules",
        "quantized",
        "y = nn.functional.linear(x, weight) * self.gain",
        "y = nn.functional.linear(x, weight) * self.gain\n"
        '        y = y * 1.3 if self.quantizer("weight").enabled else y',
        {"test_the_quantized_output_is_close"},
    ),
    Mistake(
        "writes into its parameters",
        "TestModules",
        "quantized",
        'return self.quantize("output", y)',
        'if self.quantizer("output").observer is not None:\n'
        "            self.gain.data.mul_(1.001)\n"
        '        return self.quantize("output", y)',
        {
            "test_calibration_leaves_the_weights_alone",
            "test_without_quantizers_it_computes_the_original",
            "test_gradients_without_quantizers_are_the_originals",
            "test_static_ranges_are_the_largest_magnitudes",
            "test_revert_undoes_everything",
        },
    ),
    Mistake(
        "remembers what is not saved",
        "TestModules",
        "quantized",
        'return self.quantize("output", y)',
        'self.seen = hasattr(self, "seen") or self.quantizer("output").observer is not None\n'
        '        return self.quantize("output", y if self.seen else y * 1.01)',
        {"test_save_and_restore_in_a_fresh_process"},
        "fresh_process or is_close",
    ),
    Mistake(
        "takes subclasses that have a forward of their own",
        "TestModules",
        "hooks",
        'target="plover.layers:Scaled",\n            quantized',
        'target="*", predicate=lambda m: any(c.__name__ == "Scaled" for c in type(m).__mro__),\n'
        "            quantized",
        {"test_a_subclass_with_its_own_forward_is_left_out"},
    ),
    Mistake(
        "does not know its own class",
        "TestModules",
        "layers",
        "class Scaled(nn.Module):",
        "class Scaled(nn.Module):\n    __qualname__ = 'Renamed'",
        {"test_a_rule_takes_the_class"},
        "a_rule_takes or dropped",
    ),
    # --- the others
    Mistake(
        "has more codes than bits",
        "TestFormats",
        "hooks",
        "bits=6",
        "bits=5",
        {"test_codes_are_in_range"},
    ),
    Mistake(
        "truncates instead of rounding",
        "TestFormats",
        "rest",
        "class codec(IntCodec):\n    pass",
        "class codec(IntCodec):\n    def round_(self, values):\n"
        "        return values.clamp_(self.min_value, self.max_value).trunc_().add_(0.0)",
        {"test_rounding_is_to_the_nearest", "test_quantizing_twice_changes_nothing"},
    ),
    Mistake(
        "leaves observers behind",
        "TestAlgorithms",
        "rest",
        "    run_max(model, plan, forward, context)\n",
        "    run_max(model, plan, forward, context)\n"
        "    from bittern.nn.observer import MaxObserver\n"
        "    for _, q in named_quantizers(model):\n"
        "        q.observer = MaxObserver(q.extremes, context.shared)\n",
        {"test_no_observer_is_left_behind"},
    ),
    Mistake(
        "draws from the global generator",
        "TestAlgorithms",
        "rest",
        "    run_max(model, plan, forward, context)\n",
        "    run_max(model, plan, forward, context)\n    torch.rand(1)\n",
        {"test_the_global_generator_is_left_alone"},
    ),
    Mistake(
        "takes any option",
        "TestAlgorithms",
        "rest",
        "def calibrate(model, plan, forward, context, *, shrink=1.0):",
        "def calibrate(model, plan, forward, context, **options):",
        {"test_unknown_options_are_refused"},
    ),
    Mistake(
        "clips half of the range",
        "TestAlgorithms",
        "rest",
        "    run_max(model, plan, forward, context)\n",
        "    run_max(model, plan, forward, context)\n"
        "    for _, q in named_quantizers(model):\n"
        "        if q.amax is not None:\n"
        "            q.set_amax(q.amax / 2)\n",
        {"test_the_error_is_no_worse_than_that_of_max"},
    ),
    Mistake(
        "ignores the other processes",
        "TestAlgorithms",
        "rest",
        "from bittern.calibration.max import run_max\n",
        "def run_max(*arguments):\n    from unittest import mock\n"
        "    from bittern.calibration.max import run_max as run\n"
        "    import bittern.calibration.observe as module\n"
        "    with mock.patch.object(module, 'reduce_max', lambda values, error: dict(values)):\n"
        "        run(*arguments)\n",
        {"test_two_processes_calibrate_like_one"},
        "two_processes or deterministic",
    ),
    Mistake(
        "writes into other blocks",
        "TestAlgorithms",
        "rest",
        "from bittern.calibration.max import run_max\n",
        "def run_max(model, *arguments):\n"
        "    from bittern.calibration.max import run_max as run\n"
        "    run(model, *arguments)\n"
        "    for parameter in model.parameters():\n"
        "        parameter.detach().mul_(1)\n",
        {"test_block_by_block_it_keeps_to_the_block"},
        "keeps_to_the_block or deterministic",
    ),
    Mistake(
        "writes the time of day",
        "TestExporter",
        "rest",
        "    written = write_plain(model, path, context)\n",
        "    import time\n    (path / 'when.txt').write_text(str(time.time_ns()))\n"
        "    written = write_plain(model, path, context)\n",
        {"test_equal_models_give_equal_bytes"},
    ),
    Mistake(
        "verifies nothing",
        "TestExporter",
        "rest",
        "    return verify_plain(path, record)\n",
        "    from bittern.records import Verification\n"
        "    return Verification(ok=True, path=str(path), client='plover', checks=('x',))\n",
        {"test_verify_finds_a_flipped_byte", "test_verify_finds_a_missing_tensor"},
    ),
    Mistake(
        "finds out too late what it cannot write",
        "TestExporter",
        "rest",
        'if any(entry.slot == "output"',
        'if any(entry.slot == "nothing"',
        {"test_an_unsupported_plan_is_refused_before_writing"},
    ),
    Mistake(
        "always declines",
        "TestKernels",
        "rest",
        "if spec.granularity != PerTensor() or x.numel() == 0:",
        "if True:",
        {"test_kernel_takes_what_it_claims"},
    ),
    Mistake(
        "keeps the sign of zero",
        "TestKernels",
        "rest",
        ".round().add(0.0)",
        ".round()",
        {
            "test_kernel_equals_the_reference",
            "test_kernel_equals_the_reference_with_static_scales",
            "test_kernel_on_adversarial_values",
            "test_kernel_on_strided_tensors",
        },
    ),
    Mistake(
        "works in place",
        "TestKernels",
        "rest",
        "    values = x / given.scale\n",
        "    values = x.div_(given.scale).mul_(given.scale) / given.scale\n",
        {
            "test_kernel_equals_the_reference",
            "test_kernel_equals_the_reference_with_static_scales",
            "test_kernel_on_adversarial_values",
            "test_kernel_on_strided_tensors",
            "test_kernel_propagates_nan_and_inf",
            "test_kernel_result_is_a_tensor_of_its_own",
        },
    ),
    Mistake(
        "knows an operator that torch does not",
        "TestTrace",
        "hooks",
        "aten.linear.default",
        "aten.lineal.default",
        {
            "test_op_names_resolve",
            "test_every_op_rule_has_a_case",
            "test_an_op_case_runs_an_operator_of_the_plugin",
        },
    ),
    Mistake(
        "has no word for its leaf",
        "TestTrace",
        "hooks",
        'reason="it is one kernel"',
        'reason=""',
        {"test_leaves_have_reasons"},
    ),
    Mistake(
        "enters what was moved",
        "TestTrace",
        "hooks",
        'LeafRule(target="plover.layers:Scaled"',
        'LeafRule(target="plover.layers:Other"',
        {
            "test_leaf_targets_resolve",
            "test_every_leaf_rule_has_a_case",
            "test_recursive_trace_does_not_enter_a_leaf",
            "test_trace_does_not_enter_a_leaf",
        },
    ),
    Mistake(
        "has a rule for an operator that no case runs",
        "TestTrace",
        "hooks",
        "aten.linear.default",
        "aten.bilinear.*",
        {"test_every_op_rule_has_a_case", "test_an_op_case_runs_an_operator_of_the_plugin"},
    ),
    Mistake(
        "gives too few axes",
        "TestTrace",
        "rest",
        "return (*x[:-1], weight[0])",
        "return x[:-1]",
        {"test_an_op_flow_gives_axes"},
    ),
    Mistake(
        "has a flow function of another shape",
        "TestTrace",
        "rest",
        "def flow(node, flow):",
        "def flow(node):",
        {"test_an_op_flow_gives_axes"},
    ),
    Mistake(
        "does not say that the features of input and weight meet",
        "TestTrace",
        "rest",
        "    flow.same(x[-1], weight[1])\n",
        "",
        {"test_an_op_flow_is_true"},
    ),
    Mistake(
        "does not say where the outputs come from",
        "TestTrace",
        "rest",
        "return (*x[:-1], weight[0])",
        "return (*x[:-1], flow.fresh(weight[0].size))",
        {"test_an_op_flow_is_true"},
    ),
    Mistake(
        "knows no symbols",
        "TestSymbols",
        "rest",
        "    return SymInfo(\n",
        "    return dict(\n",
        {"test_the_symbols_function_answers", "test_the_trace_uses_the_symbols"},
    ),
    Mistake(
        "forgets a parameter",
        "TestSymbols",
        "rest",
        'tensors={"weight": 0, "gain": 0}',
        'tensors={"weight": 0}',
        {"test_symbols_fit_the_tensors", "test_symbols_are_true"},
    ),
    Mistake(
        "names the wrong dimension of a weight",
        "TestSymbols",
        "rest",
        'size=inputs, tensors={"weight": 1}',
        'size=inputs, tensors={"weight": 0}',
        {"test_symbols_fit_the_tensors", "test_symbols_are_true"},
    ),
    Mistake(
        "gives no size",
        "TestSymbols",
        "rest",
        "            size=outputs,\n",
        "",
        {"test_symbols_fit_the_tensors"},
    ),
    Mistake(
        "names the wrong dimension of the output",
        "TestSymbols",
        "rest",
        "cl_type=kinds.OUTGOING,\n            elastic_dims={-1},",
        "cl_type=kinds.OUTGOING,\n            elastic_dims={0},",
        {"test_symbols_are_true"},
    ),
    Mistake(
        "calls sortable what has an order",
        "TestSymbols",
        "layers",
        "return nn.functional.linear(x, self.weight)",
        "return nn.functional.linear(x.cumsum(-1), self.weight)",
        {"test_symbols_are_true"},
    ),
    Mistake(
        "writes into the module that it looks at",
        "TestSymbols",
        "rest",
        "    outputs, inputs = module.weight.shape\n",
        "    outputs, inputs = module.weight.shape\n    module.seen = True\n",
        {"test_the_symbols_function_answers"},
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.what.replace(" ", "-"))
def test_a_mistake_is_noticed_by_the_test_that_is_about_it(mistake: Mistake, run_kit: Any) -> None:
    outcomes = run_kit(
        "-k",
        f"{mistake.group} and ({mistake.select})",
        changes={mistake.file: (mistake.old, mistake.new)},
        requires=mistake.requires,
    )

    messages = [m for n, m in outcomes.messages.items() if outcomes.by_test[n] == "failed"]
    assert outcomes.failed() == mistake.noticed_by, "\n\n".join(messages)
    assert "passed" in outcomes.by_test.values()


def test_a_tracer_that_enters_a_leaf_is_noticed(
    run_kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "leaves", ClassTable[LeafRule]([]))
    outcomes = run_kit("-k", "TestTrace")

    assert outcomes.failed() == {
        "test_recursive_trace_does_not_enter_a_leaf",
        "test_trace_does_not_enter_a_leaf",
    }


def test_a_rule_for_all_overloads_has_a_name_of_its_own(run_kit: Any) -> None:
    changes = {"hooks": ("aten.linear.default", "aten.linear.*")}
    outcomes = run_kit("-k", "TestTrace", changes=changes)

    assert outcomes.failed() == set()
    assert set(outcomes.by_test.values()) == {"passed"}


ARCHIVE = """
def pack(path):
    from zipfile import ZipFile

    with ZipFile(path / "weights.zip", "w") as archive:
        archive.write(path / "model.safetensors", "weights")
    (path / "model.safetensors").unlink()


def verify(path, record):
    from tempfile import TemporaryDirectory
    from pathlib import Path

    with TemporaryDirectory() as folder:
        data = (path / "weights.zip").read_bytes()
        start = data.index(b"weights") + len("weights")
        (Path(folder) / "model.safetensors").write_bytes(data[start : data.index(b"PK", start)])
        return verify_plain(Path(folder), record)
"""
TENSOR_BYTE = """
    format = "plover-files"

    def tensor_byte(self, path):
        file = path / "weights.zip"
        return file, file.read_bytes().rindex(b"PK\\x01\\x02") - 1
"""


@pytest.mark.parametrize(
    ("told", "checked", "outcome"),
    [(True, True, "passed"), (True, False, "failed"), (False, True, "skipped")],
)
def test_an_archive_says_where_its_tensors_are(
    told: bool, checked: bool, outcome: str, run_kit: Any
) -> None:
    """Regression: the last byte was flipped, which in an archive is no tensor data."""
    old = """    written = write_plain(model, path, context)
    return replace(written, report=replace(written.report, format="plover-files"))


def verify(path, record):
    return verify_plain(path, record)
"""
    new = old.partition("\n\n")[0].replace("    return", "    pack(path)\n    return") + ARCHIVE
    if not checked:
        new = new.replace("return verify_plain(Path(folder), record)", "return blind(path)")
        new += """

def blind(path):
    from bittern.records import Verification
    return Verification(ok=True, path=str(path), client="plover", checks=("nothing",))
"""
    changes = {"rest": (old, new)}
    if told:
        changes["conformance"] = ('    format = "plover-files"\n', TENSOR_BYTE)
    outcomes = run_kit("-k", "TestExporter and flipped", changes=changes)

    assert list(outcomes.by_test.values()) == [outcome], outcomes.messages
