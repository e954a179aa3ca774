"""What waiting OpenMP threads cost here: the library and its policy, the cores, the quota and the load.

A thread that waits for the others of a parallel region spins by default, for milliseconds. On a core that another thread needs,
it spins away the time of the one it waits for, and a step takes many times as long. Under the passive policy it sleeps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: What each OpenMP library calls its own setting, which outranks OMP_WAIT_POLICY.
_OWN = {"libgomp": "GOMP_SPINCOUNT", "libiomp5": "KMP_BLOCKTIME", "libomp": "KMP_BLOCKTIME"}


@dataclass(frozen=True)
class Waiting:
    """How the threads of an OpenMP library wait."""

    library: str  #: libgomp, libiomp5 or libomp; "" where it is not known
    path: str
    setting: str  #: the variable that decides and its value, as in OMP_WAIT_POLICY=passive; "" where none is set
    spins: bool

    @property
    def remedy(self) -> str:
        """What makes them sleep."""
        own = self.setting.partition("=")[0]
        unset = f", and unset {own}, which outranks it" if own and own != "OMP_WAIT_POLICY" else ""
        return f"set OMP_WAIT_POLICY=passive before Python starts{unset}"


def waiting(maps: str, environment: Mapping[str, str]) -> Waiting:
    """How threads wait, by the first OpenMP library in `maps` (of /proc/self/maps) and what the variables say.

    Sources: libgomp's manual (GOMP_SPINCOUNT: 0 for passive, else 300,000 rounds or more); LLVM's kmp_settings.cpp
    (KMP_BLOCKTIME: 0 for passive, 200 ms by default).
    """
    found = re.search(r"(/\S*/)?\b(libgomp|libiomp5|libomp)\b[^/\s]*$", maps, re.M)
    library, path = (found[2], found[0]) if found else ("", "")
    own = _OWN.get(library, "")
    if value := environment.get(own, "").strip():
        return Waiting(library, path, f"{own}={value}", re.fullmatch(r"0+\s*[a-z]*", value.lower()) is None)
    policy = environment.get("OMP_WAIT_POLICY", "").strip()
    return Waiting(library, path, f"OMP_WAIT_POLICY={policy}" if policy else "", policy.lower() != "passive")


def maps() -> str:
    """What this process has loaded; empty where the system does not say."""
    with suppress(OSError):
        return Path("/proc/self/maps").read_text()
    return ""


def cores() -> int:
    """Cores of the machine."""
    return os.cpu_count() or 1


def load() -> float | None:
    """Threads that ran or waited for a core in the last minute, on average; None where the system does not say."""
    with suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return None


def quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process allow, version 1 or 2; None: no limit."""
    limits = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            group = mount / name.strip("/")
            for folder in (group, *group.parents):  # a group above may allow less; a container shows its own as the root
                with suppress(OSError, ValueError):
                    if controllers:
                        parts = [(folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period")]
                    else:
                        parts = (folder / "cpu.max").read_text().split()
                    allowed, period = int(parts[0]), int(parts[1])  # "max" is no limit, nor is -1
                    if allowed > 0:
                        limits.append(allowed / period)
                if folder == mount:
                    break
    return min(limits, default=None)


def crowded(threads: int, machine_cores: int, allowed: float | None, busy: float | None) -> str:
    """Why `threads` threads have to share cores; empty: they need not.

    Args:
        threads: of one parallel region.
        machine_cores: all cores of the machine, which `busy` counts on.
        allowed: quota of the control group in cores.
        busy: load of the last minute, of other programs.
    """
    if threads < 2:  # nobody waits
        return ""
    if allowed is not None and allowed < threads:
        return f"the control group allows {allowed:g} cores' worth of time to {threads} threads"
    if busy is not None and int(busy) + threads > machine_cores:
        free = max(0, machine_cores - int(busy))
        return f"a load of {busy:.1f} on {machine_cores} cores leaves {free} free for {threads} threads"
    return ""
