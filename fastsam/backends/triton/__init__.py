"""The triton backend: one kernel launch per pass, bucket and device."""
