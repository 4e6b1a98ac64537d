"""What a checkpoint format owes its users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bittern.convert import plan_of
from bittern.errors import ExportError, OutputError, VerificationError
from bittern.exporting import ExportRecord, checksum
from bittern.exporting.record import FILE
from bittern.nn import named_quant_modules
from bittern.numerics import Quantized, dequantize, quantize
from bittern.records import ExportReport, Verification
from bittern.testing.base import Conformance, check, given_cases, named, once
from bittern.testing.harness import PluginHarness, hooks_module
from bittern.toolkit import Toolkit

__all__ = ["ExportCase", "ExporterConformance"]

T = TypeVar("T")


@dataclass(frozen=True)
class ExportCase:
    """One model to write.

    Attributes:
        name: The test id.
        make: Builds the model; called under a fixed seed.
        recipe: What to do to it.
        data: Calibration data, made from a generator; ``None`` where the recipe needs none.
        unsupported: A recipe that the format's client cannot load; ``None`` where it loads all.
    """

    name: str
    _: KW_ONLY
    make: Callable[[], nn.Module]
    recipe: Any
    data: Callable[[torch.Generator], Iterable[Any]] | None = None
    unsupported: Any = None


@dataclass(frozen=True)
class Exported:
    """A written case: the model in memory and its directory."""

    model: nn.Module
    path: Path
    report: ExportReport


class ExporterConformance(Conformance):
    """Exporters: whole or not there, the same bytes every time, verified by somebody else.

    The verification of an intact checkpoint, which may start a client, runs once per case.

    Attributes:
        format: Name of the exporter.
    """

    format: ClassVar[str] = ""

    def cases(self) -> Sequence[ExportCase]:
        """Return the cases."""
        return ()

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case."""
        return {"case": named(given_cases(cls))}

    # --- for formats that are no safetensors ---

    def tensor_file(self, path: Path) -> Path:
        """Return the file that holds the tensors: the largest one, unless a subclass knows."""
        files = [f for f in path.rglob("*") if f.is_file() and f.name != FILE]
        check(files, f"the export holds nothing beside {FILE}")
        return max(files, key=lambda f: (f.stat().st_size, f.name))

    def tensor_byte(self, path: Path) -> tuple[Path, int]:
        """Return a file of the checkpoint at ``path`` and the position of a byte of tensor data.

        What is there must matter: no header, no padding, no index at the end of an archive.
        """
        file = self.tensor_file(path)
        if file.suffix != ".safetensors":
            pytest.skip(f"{file.name} is no safetensors; override tensor_byte")
        return file, file.stat().st_size - 1  # it ends with tensor data

    def remove_tensor(self, path: Path) -> str:
        """Remove one tensor from the checkpoint at ``path`` and return its name."""
        file = self.tensor_file(path)
        if file.suffix != ".safetensors":
            pytest.skip(f"{file.name} is no safetensors; override remove_tensor")
        tensors = load_file(file)
        name = sorted(tensors)[0]
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        return name

    # --- what is written ---

    def test_what_is_written_verifies(
        self, case: ExportCase, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Protects users from a checkpoint that its engine does not load."""
        verdict = self._verified(case, tmp_path_factory)
        findings = "; ".join(f"{f.tensor_or_field}: {f.problem}" for f in verdict.findings)
        check(verdict.ok, f"{verdict.client} says: {findings}")
        check(verdict.checks, "the verification does not say what it compared")

    def test_the_client_computes_what_memory_did(
        self, case: ExportCase, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Protects users from a checkpoint that loads and computes something else.

        By the perplexity on the recorded probe for language models, by the decoded weights for
        every other.
        """
        record = self._record(case, tmp_path_factory)
        verdict = self._verified(case, tmp_path_factory)
        if record.probe is None:
            check(record.weights, "no simulated weight is recorded, so nothing can be compared")
            check(verdict.ok, "the decoded weights differ")
            return
        check(
            verdict.perplexity is not None and verdict.reference_perplexity is not None,
            "the model has a probe, and the client did not run it",
        )
        assert verdict.perplexity is not None
        assert verdict.reference_perplexity is not None
        apart = abs(verdict.perplexity / verdict.reference_perplexity - 1)
        check(
            apart <= 1e-2,
            f"the perplexity is {verdict.perplexity:.4f} in the client and "
            f"{verdict.reference_perplexity:.4f} in memory",
        )

    def test_every_quantized_weight_is_recorded(
        self, case: ExportCase, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Protects users from a verification that did not look at a weight."""
        exported = self._exported(case, tmp_path_factory)
        record = self._record(case, tmp_path_factory)
        expected = _simulated(exported.model)
        missing = sorted(expected.keys() - record.weights.keys())
        check(not missing, f"{FILE} has no checksum of {', '.join(missing)}")
        wrong = sorted(n for n, sums in expected.items() if record.weights[n] not in sums)
        check(not wrong, f"recorded with other values than were simulated: {', '.join(wrong)}")
        check(
            exported.report.quantized == len(expected),
            f"the report counts {exported.report.quantized} quantized weights of {len(expected)}",
        )

    def test_the_report_tells_what_is_there(
        self, case: ExportCase, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Protects users who read sizes and files from the report."""
        exported = self._exported(case, tmp_path_factory)
        report, path = exported.report, exported.path
        files = {str(f.relative_to(path)): f.stat().st_size for f in _files(path)}
        check(dict(report.files) == files, f"the report names {dict(report.files)}, not {files}")
        check(report.format == self.format, f"the report says format {report.format!r}")
        check(FILE in files, f"there is no {FILE}")

    def test_equal_models_give_equal_bytes(
        self, case: ExportCase, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Protects users who compare checksums, or cache."""
        first = self._exported(case, tmp_path_factory).path
        second = tmp_path / "again"
        self.toolkit().export(
            self._quantized(case), second, format=self.format, verify=False, data=self._data(case)
        )
        ours, theirs = ({str(f.relative_to(p)): f for f in _files(p)} for p in (first, second))
        check(list(ours) == list(theirs), f"the files {list(ours)} became {list(theirs)}")
        changed = [n for n in ours if ours[n].read_bytes() != theirs[n].read_bytes()]
        check(not changed, f"other bytes the second time: {', '.join(changed)}")

    def test_exporting_leaves_the_model_alone(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users who go on with the model: to evaluate it, to export it elsewhere."""
        model = self._quantized(case)
        before = _checksums(model)
        classes = [type(m) for m in model.modules()]
        self.toolkit().export(model, tmp_path / "out", format=self.format, verify=False)
        after = _checksums(model)
        changed = sorted(n for n in before | after if before.get(n) != after.get(n))
        check(not changed, f"changed: {', '.join(changed)}")
        check([type(m) for m in model.modules()] == classes, "classes were changed")

    # --- what is not written ---

    def test_an_interrupted_write_leaves_nothing(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users from half a checkpoint that looks like one, after Ctrl-C."""
        path = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            self._interrupted(case).export(
                self._quantized(case),
                path,
                format=self.format,
                verify=False,
                progress=_Interrupted(),
            )
        left = [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")]
        check(not left, f"left behind: {', '.join(left)}")

    def test_a_failure_after_writing_leaves_nothing(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users from a checkpoint that lacks what a plugin adds at the end."""
        path = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            self._interrupted(case).export(
                self._quantized(case), path, format=self.format, verify=False
            )
        left = [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")]
        check(not left, f"left behind: {', '.join(left)}")

    def test_a_directory_with_files_is_left_alone(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users from losing what was in the directory."""
        (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(OutputError):
            self.toolkit().export(self._quantized(case), tmp_path, format=self.format, verify=False)
        files = {f.name: f.read_text(encoding="utf-8") for f in _files(tmp_path)}
        check(files == {"precious.txt": "mine"}, f"the directory now holds {sorted(files)}")

    def test_an_unsupported_plan_is_refused_before_writing(
        self, case: ExportCase, tmp_path: Path
    ) -> None:
        """Protects users from learning after the calibration that no engine can load it."""
        if case.unsupported is None:
            pytest.skip("the case names no recipe that the client cannot load")
        toolkit, model = self.toolkit(), self._made(case)
        plan = toolkit.plan(model, case.unsupported)
        with pytest.raises(ExportError):
            toolkit.check_export(model, plan, self.format)
        toolkit.quantize(model, case.unsupported, self._data(case))
        with pytest.raises(ExportError):
            toolkit.export(model, tmp_path / "out", format=self.format, verify=False)
        check(not any(tmp_path.iterdir()), "something was written")

    def test_an_uncalibrated_model_is_refused(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users from scales that nobody computed."""
        toolkit, model = self.toolkit(), self._made(case)
        toolkit.convert(model, toolkit.plan(model, case.recipe))
        with pytest.raises(ExportError):
            toolkit.export(model, tmp_path / "out", format=self.format, verify=False)
        check(not any(tmp_path.iterdir()), "something was written")

    # --- what is damaged ---

    def test_verify_finds_a_flipped_byte(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users from bad disks and broken downloads."""
        path = self._copy(case, tmp_path)
        file, position = self.tensor_byte(path)
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(bytes(content))
        self._check_found(path, "a flipped byte")

    def test_verify_finds_a_missing_tensor(self, case: ExportCase, tmp_path: Path) -> None:
        """Protects users from an engine that fills the gap with random numbers."""
        path = self._copy(case, tmp_path)
        name = self.remove_tensor(path)
        self._check_found(path, f"the missing tensor {name}")

    # --- helpers ---

    def _made(self, case: ExportCase) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return case.make().eval()

    def _data(self, case: ExportCase) -> list[Any] | None:
        generator = torch.Generator().manual_seed(0)
        return list(case.data(generator)) if case.data is not None else None

    def _quantized(self, case: ExportCase) -> nn.Module:
        model = self._made(case)
        self.toolkit().quantize(model, case.recipe, self._data(case))
        return model

    def _exported(self, case: ExportCase, folders: pytest.TempPathFactory) -> Exported:
        def write() -> Exported:
            check(self.format, 'say which exporter is tested: format = "name"')
            path = folders.mktemp("export") / "out"
            model = self._quantized(case)
            report = self.toolkit().export(
                model, path, format=self.format, verify=False, data=self._data(case)
            )
            return Exported(model, path, report)

        return once(type(self), f"export {case.name}", write)

    def _verified(self, case: ExportCase, folders: pytest.TempPathFactory) -> Verification:
        path = self._exported(case, folders).path
        verify = self.toolkit().verify
        return once(type(self), f"verdict {case.name}", lambda: verify(path))

    def _record(self, case: ExportCase, folders: pytest.TempPathFactory) -> ExportRecord:
        record = ExportRecord.read(self._exported(case, folders).path)
        check(record is not None, f"there is no {FILE}")
        assert record is not None
        return record

    def _copy(self, case: ExportCase, folder: Path) -> Path:
        """Write the case once more, to be damaged."""
        path = folder / "damaged"
        model = self._quantized(case)
        self.toolkit().export(model, path, format=self.format, verify=False)
        return path

    def _check_found(self, path: Path, what: str) -> None:
        try:
            verdict = self.toolkit().verify(path)
        except VerificationError:
            return
        check(not verdict.ok and verdict.findings, f"the verification does not find {what}")

    def _interrupted(self, case: ExportCase) -> Toolkit:
        """Return a Toolkit in which Ctrl-C comes after writing, at the latest."""

        def after_export(report: ExportReport, path: Path) -> None:
            raise KeyboardInterrupt

        self.toolkit()  # skips where the plugin is not loaded
        subject = self.subject()
        plugins = [] if subject.is_core else [subject.candidate]
        late = hooks_module("interruption", after_export=after_export)
        harness = PluginHarness(*plugins, late)
        try:
            return harness.toolkit
        finally:
            harness.close()  # what is loaded stays loaded


class _Interrupted:
    """Progress that is interrupted after its first item."""

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        for item in items:
            yield item
            raise KeyboardInterrupt


def _files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.is_file())


def _checksums(model: nn.Module) -> dict[str, int]:
    tensors = model.state_dict().items()
    return {name: checksum(tensor) for name, tensor in tensors if isinstance(tensor, Tensor)}


def _simulated(model: nn.Module) -> dict[str, set[int]]:
    """Return the allowed checksums of every quantized weight.

    Its float32 values, decoded to float32 or by way of the weight's own dtype.
    """
    plan_of(model)  # it is quantized
    found: dict[str, set[int]] = {}
    for path, module in named_quant_modules(model):
        for quantizer in module.slots().values():
            if quantizer.tensor is not None:
                weight = getattr(module, quantizer.tensor).detach()
                packed = quantize(weight, quantizer.spec, quantizer.scales)
                wide = Quantized(packed.codes, packed.scales, packed.spec, torch.float32)
                name = f"{path}.{quantizer.tensor}" if path else quantizer.tensor
                found[name] = {checksum(dequantize(q).float()) for q in (packed, wide)}
    return found
