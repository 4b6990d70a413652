"""From a source to a `Plan`: options, formats of modules, jobs, shards and offsets."""
