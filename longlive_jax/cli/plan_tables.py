"""The tables that `longlive plan` prints."""

from typing import Any

__all__ = ["distillation_table", "table"]

GIB = 2**30
LABELS = {
    "average": "EMA",
    "kv_cache": "KV cache",
    "moments": "optimizer moments",
    "keys_and_values_of_a_layer": "K and V of one layer",
    "keys_and_values_of_texts": "text K and V",
}
"""Names in the table of keys in the report; other keys are shown as they are."""


def table(report: dict[str, Any]) -> str:
    """The report as a text table."""
    state = report["state_bytes_per_device"]
    activations = report["activation_bytes_per_device"]
    rows = [
        ("devices", f"{report['devices']} x {report['device']}, {_mesh(report['mesh'])}"),
        ("model", f"{report['model']}, {report['parameters'] / 1e9:.2f} B parameters"),
        ("precision", report["precision"]),
        ("attention", report["attention"]),
        ("batch", _batch(report)),
        ("recomputation", _remat_policy(report)),
        ("compute", _compute(report)),
        ("communication", _communication(report)),
        ("train state", _sizes(state)),
        ("activations", _sizes(activations)),
        ("sampling KV cache", f"{report['kv_cache_bytes'] / GIB:.2f} GiB per video"),
        ("peak memory", verdict(report)),
    ]
    return _aligned(rows)


def verdict(report: dict[str, Any]) -> str:
    """Peak memory of a device, and by how much it fits or does not."""
    total, reserved = report["device_bytes"], report["reserved_bytes"]
    limit = (
        f"{(total - reserved) / GIB:.1f} of {total / GIB:.1f} GiB usable, "
        f"{reserved / GIB:.0f} GiB reserved"
    )
    if report["fits"] is None:
        return f"not compiled; {limit}"
    spare = (total - reserved - report["peak_bytes_per_device"]) / GIB
    result = (
        f"fits, {spare:.1f} GiB to spare" if spare >= 0 else f"does not fit by {-spare:.1f} GiB"
    )
    return f"{report['peak_bytes_per_device'] / GIB:.1f} GiB per device: {result} ({limit})"


def _batch(report: dict[str, Any]) -> str:
    height, width, channels = report["size"]
    accumulate = report["accumulate"]
    microbatches = f", gradient accumulation over {accumulate} microbatches" * (accumulate > 1)
    return (
        f"{report['batch']} clips of {report['latent_frames']} x {height}x{width}x{channels} "
        f"({report['seconds_of_video']:.0f} s) in chunks of {report['chunk']}, "
        f"{report['tokens_per_step']:,} tokens{microbatches} ({report['clips_from']})"
    )


REMAT = {
    "none": "none",
    "attention_saved": "every layer except attention",
    "everything": "every layer",
}
"""What every rematerialization policy recomputes."""


def _remat_policy(report: dict[str, Any]) -> str:
    layers = REMAT[report["remat"]]
    chunks = report["ffn_parts"]
    return layers + (f", feed-forward in {chunks} chunks of the tokens" if chunks > 1 else "")


def _compute(report: dict[str, Any]) -> str:
    kinds = ", ".join(f"{k} {x / 1e15:.2f}" for k, x in report["flops"].items())
    recomputed = report["recomputed_flops_per_step"] / 1e15
    return (
        f"{report['flops_per_step'] / 1e15:.2f} PFLOP per step ({kinds}) and {recomputed:.2f} "
        f"recomputed; at least {report['least_seconds_per_step']:.2f} s at peak bf16 FLOP/s"
    )


def _communication(report: dict[str, Any]) -> str:
    if report["collective_bytes_per_step"] is None:
        return "not compiled"
    kinds = report["collectives_per_device"]
    volumes = ", ".join(
        f"{name} {kind['bytes'] / GIB:.2f} ({kind['count']})"
        for name, kind in kinds.items()
        if kind["count"]
    )
    total = sum(kind["bytes"] for kind in kinds.values()) / GIB
    return f"{total:.1f} GiB sent per device and step" + (f": {volumes}" if volumes else "")


def _sizes(values: dict[str, int]) -> str:
    """Their sum and all that are not zero, in GiB."""
    total = sum(values.values()) / GIB
    labels = {k: LABELS.get(k, k.replace("_", " ")) for k in values}
    sizes = ", ".join(f"{labels[k]} {x / GIB:.2f}" for k, x in values.items() if x)
    return f"{total:.2f} GiB per device: {sizes}"


def _mesh(axes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in axes.items())


def distillation_table(report: dict[str, Any]) -> str:
    """The report on a distillation as a text table."""
    state, roles = report["state_bytes_per_device"], report["roles"]
    rows = [
        ("devices", f"{report['devices']} x {report['device']}, {_mesh(report['mesh'])}"),
        ("models", f"{report['model']}, {report['parameters'] / 1e9:.2f} B parameters"),
        *((name, _role(role)) for name, role in roles.items()),
        ("batch", _videos(report)),
        ("recomputation", _remat_policy(report)),
        ("train state", _sizes(state)),
        ("activations", _sizes(report["activation_bytes_per_device"])),
        *((f"{k}'s update", _update(x)) for k, x in report.get("updates", {}).items()),
        ("peak memory", verdict(report)),
    ]
    return _aligned(rows)


def _role(role: dict[str, Any]) -> str:
    """Precision and size of a frozen model."""
    if role["shared_with"] is not None:
        return f"{role['precision']}, the arrays of the {role['shared_with']}"
    return f"{role['precision']}, {role['bytes'] / GIB:.2f} GiB per device"


def _videos(report: dict[str, Any]) -> str:
    height, width, channels = report["size"]
    return (
        f"{report['batch']} videos of {report['latent_frames']} x {height}x{width}x{channels} "
        f"({report['seconds_of_video']:.0f} s) in chunks of {report['chunk']}, "
        f"{report['sampling_steps']} steps ({report['videos_from']})"
    )


def _update(update: dict[str, Any]) -> str:
    return (
        f"peak {update['peak_bytes_per_device'] / GIB:.1f} GiB per device, "
        f"{update['argument_bytes_per_device'] / GIB:.1f} of them arguments; "
        f"{update['collective_bytes_per_step'] / GIB:.1f} GiB sent per step"
    )


def _aligned(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
