"""Algorithms, exporters, kernels and recipes that plugins register."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bittern.records.checks import check_import_strings, check_priority

__all__ = ["Algorithm", "Exporter", "KernelRule", "RecipeSource"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A calibration algorithm that a recipe's ``algorithm:`` can name.

    Attributes:
        name: The name in recipes.
        run: ``"package.module:function"`` called as
            ``run(model, plan, forward, context, **options)``, see `bittern.calibration.context`.
        needs: What it needs beyond the weights: any of ``data``, ``trace``, ``hessian``,
            ``gradients``, ``original`` (what unquantized blocks return, or the parameters before
            the first step if it takes the model as a whole). ``data`` means: only when the plan
            has static activation quantizers.
        sequential: Whether it runs block by block, each block on what the quantized blocks before
            it compute; see `bittern.calibration.blocks`.
        whole: Whether it takes the model as a whole even where the others go block by block.
        restore: ``"package.module:function"`` called as ``restore(model)`` when a saved state has
            been loaded into a fresh model, for what the step did besides changing tensors.
        description: One line for people.
    """

    name: str
    run: str
    needs: frozenset[str] = frozenset()
    sequential: bool = False
    whole: bool = False
    restore: str | None = None
    description: str = ""

    def __post_init__(self) -> None:
        check_import_strings(self, "run", "restore")


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A checkpoint format.

    Attributes:
        name: The format's name for ``--format``.
        write: ``"package.module:function"`` called as ``write(model, path, context)``; it writes
            into the existing, empty directory ``path`` and returns a `bittern.exporting.Written`.
        verify: ``"package.module:function"`` called as ``verify(path, record)`` with the content
            of bittern.json (``None`` for a checkpoint that another tool wrote); it loads ``path``
            in a client that is not ours, in a fresh process, and returns a ``Verification``.
        check: ``"package.module:function"`` called as ``check(model, context)`` before anything is
            computed; it raises `ExportError` where the client cannot load the plan.
        client: Who reads the format.
        priority: The highest exporter that accepts the model is the default format.
        accepts: ``"package.module:function"`` that says whether a model can be written so;
            ``None`` accepts any model.
        description: One line for people.
    """

    name: str
    write: str
    verify: str | None = None
    check: str | None = None
    client: str = ""
    priority: int = 0
    accepts: str | None = None
    description: str = ""

    def __post_init__(self) -> None:
        check_import_strings(self, "write", "verify", "check", "accepts")
        check_priority(self)


@dataclass(frozen=True, kw_only=True)
class KernelRule:
    """A fast implementation of one operation.

    Attributes:
        op: ``"fake_quantize"`` and, later, ``"amax"``, ``"pack"``, ``"linear"``.
        impl: ``"package.module:function"`` with the reference's signature, bit-exact with it.
        device: ``torch.device.type`` it runs on; ``"*"`` for every one.
        formats: Names of the number formats it implements; ``"*"`` among them for every one.
        dtypes: Names of the input dtypes it takes, for example ``"bfloat16"``.
        capability: Smallest CUDA capability, as ``(major, minor)``.
        backend: A name. A rule with one is used only by quantizers whose spec names it, and need
            not be exact: a numerics of your own, or an implementation with a price (a compiler).
        priority: Higher wins.
    """

    op: str
    impl: str
    device: str
    formats: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    capability: tuple[int, int] | None = None
    backend: str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        check_import_strings(self, "impl")
        check_priority(self)


@dataclass(frozen=True, kw_only=True)
class RecipeSource:
    """A named recipe.

    Attributes:
        name: The name for ``--recipe`` and ``extends:``.
        package: Package that ships the YAML file.
        resource: File name inside ``package``.
        data: The recipe as plain data instead of a file.
        description: One line for people.
    """

    name: str
    package: str | None = None
    resource: str | None = None
    data: Mapping[str, object] = field(default_factory=dict)
    description: str = ""
