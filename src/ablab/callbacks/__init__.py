"""Lightning callbacks: progress output, profiling, sampling, checks and diagnostics."""
