"""How tests compile. Most of a test is compiling programs that run once or a few times."""

# XLA's back end for CPUs at its laziest: a compilation takes a fifth of the time (a denoiser of two levels 9.7 s,
# with the first three of these 6.0 s, with all 1.9 s); what it makes runs slower.
QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def products_on_tpus(function, *inputs) -> list[tuple[str, bool]]:
    """Type of every matrix product, and whether it is asked for at the highest precision.

    Without that, TPUs round float32 to bfloat16 first.
    """
    import jax

    lowered = jax.jit(function).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    lines = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    return [(line.rpartition("x")[2].strip(">"), "HIGHEST" in line) for line in lines]
