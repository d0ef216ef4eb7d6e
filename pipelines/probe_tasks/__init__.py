"""The probe_tasks stage: what the probes predict, through the teachers' own decoders, measured against the truth."""
