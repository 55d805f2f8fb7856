"""The dashboards as code: one module each, over the parts in ``panels``."""
