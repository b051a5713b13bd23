"""What `import shardstep` offers: the commands as functions, and a run's folder as an object. No command imports it."""
