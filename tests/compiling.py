"""How tests compile. Most of a test is compiling programs that run once or a few times."""

# XLA's back end for CPUs at its laziest: a compilation takes half the time; what it makes runs slower.
QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
)
