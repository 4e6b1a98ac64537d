"""Writing checkpoints: packed tensors, whole directories, and a record to verify them by."""

from bittern.exporting.context import ExportContext, Written
from bittern.exporting.directory import check_output, left_aside, staged_directory
from bittern.exporting.packed import (
    PackedModule,
    check_calibrated,
    packed_modules,
    plain_tensors,
)
from bittern.exporting.record import ExportRecord, Probe, checksum, checksums
from bittern.exporting.run import check_export, choose_exporter, run_export

__all__ = [
    "ExportContext",
    "ExportRecord",
    "PackedModule",
    "Probe",
    "Written",
    "check_calibrated",
    "check_export",
    "check_output",
    "checksum",
    "checksums",
    "choose_exporter",
    "left_aside",
    "packed_modules",
    "plain_tensors",
    "run_export",
    "staged_directory",
]
