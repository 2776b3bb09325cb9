from .figures import figures, table

__all__ = ["figures", "table"]
