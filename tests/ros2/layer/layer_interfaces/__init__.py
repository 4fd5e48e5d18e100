"""Messages, services and actions as Python classes, made from interface text; see packages.install."""
