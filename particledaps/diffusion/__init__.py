"""The mathematics: sigma paths, noise schedules, denoisers, the probability-flow ODE and MCMC kernels."""
