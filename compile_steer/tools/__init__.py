"""Beside the main line: lineage, audit, composition, serving engines, other tools' vectors."""
