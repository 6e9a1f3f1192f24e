"""How tests compile. Most of a test is compiling programs that run once or a few times."""

# XLA's back end for CPUs at its laziest: a compilation takes a fifth of the time (a denoiser of two levels 9.7 s,
# with the first three of these 6.0 s, with all 1.9 s); what it makes runs slower.
QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
