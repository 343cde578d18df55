"""What `moe-ext bench` and the scripts in benchmarks/ share: a layer, its peers, how they are timed and recorded."""
