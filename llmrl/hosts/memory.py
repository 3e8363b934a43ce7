"""Peak memory of one job after the other in the same process."""

from __future__ import annotations

from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # see proc(5)


class PeakMemory:
    """The most memory in use since it was made.

    On a CUDA device what torch has allocated there; elsewhere the resident memory of the whole process, interpreter and
    libraries included, where the system tells it (Linux).

    Args:
        device: Where the job runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text(_RESET_PEAK)
        except OSError:
            self._known = False

    def read_bytes(self) -> int | None:
        """The peak; None where it is not known."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._known:
            return None
        lines = _STATUS.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
