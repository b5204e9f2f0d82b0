"""`python -m mlloss_cuda` prints what was built and what is usable here."""

from mlloss_cuda.build_information import build_info, fallback_reason


def main() -> None:
    """Print `build_info()`, one fact a line."""
    information = build_info()
    width = max(map(len, information))
    for name, value in information.items():
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, list):
            shown = " ".join(value) or "none"
        else:
            shown = "-" if value is None else str(value)
        if name == "cuda_usable" and not value:
            shown += f" ({fallback_reason('cuda')})"
        print(f"{name:{width}}  {shown}")


if __name__ == "__main__":
    main()
