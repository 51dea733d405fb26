"""The folder that keeps compiled programs between processes.

XLA compiles a model anew in every process unless JAX finds the program in its persistent
compilation cache. The folder's name contains the version of jaxlib and a digest of the CPU's
features, because a program compiled for one CPU can crash on another.
"""

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import platformdirs

__all__ = ["compilation_cache_folder", "cpu_features", "enable_compilation_cache"]

CPU_INFO = Path("/proc/cpuinfo")


def compilation_cache_folder() -> Path:
    """The folder for this version of jaxlib and this CPU, in the user's cache folder.

    The user's cache folder is `$XDG_CACHE_HOME` or `~/.cache` on Linux, and `~/Library/Caches` on
    macOS. Nothing is created, and JAX is not imported.
    """
    digest = hashlib.sha256(cpu_features().encode()).hexdigest()[:12]
    name = f"jaxlib-{version('jaxlib')}-{platform.machine()}-{digest}"
    return platformdirs.user_cache_path("longlive-jax") / "compiled" / name


def cpu_features() -> str:
    """The CPU's instruction sets, as the operating system lists them."""
    if CPU_INFO.is_file():
        names = ("flags", "Features", "model name")  # x86-64; aarch64; both
        lines = {line.split(":")[0].strip(): line for line in CPU_INFO.read_text().splitlines()}
        return "\n".join(lines[name] for name in names if name in lines)
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return platform.processor()


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keeps the programs that this process compiles from now on, and returns the folder.

    `folder` is by default the one that the environment variable `JAX_COMPILATION_CACHE_DIR` names,
    else `compilation_cache_folder()`. The commands of `longlive` do this by themselves.
    """
    import jax

    configured = jax.config.jax_compilation_cache_dir
    chosen = Path(folder or configured or compilation_cache_folder())
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return chosen
