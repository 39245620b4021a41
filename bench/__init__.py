"""What is measured, each script in one run on one machine, printed as ratios where there is a peer."""
