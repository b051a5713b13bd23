"""Job scripts for Slurm: text, no modules. launch/jobs/ reads the templates."""
