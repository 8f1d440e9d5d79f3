"""Handles of registered versions: what a script registers by making one, and passes on as a spec."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardmill.client.client import Client
from shardmill.client.transforms import Function, Part, Probe
from shardmill.core.api import Failures, TransformInfo, TransformStatistics
from shardmill.core.errors import BadRequest
from shardmill.core.specs import ErrorPolicy, Spec
from shardmill.marking import marks_of


class Registered:
    """A version at a node, with the options it is to be read with; `a >> b` registers what both give in a row."""

    def __init__(self, client: Client, info: TransformInfo, spec: Spec) -> None:
        self.info = info
        self._client = client
        self._spec = spec

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def uuid(self) -> str:
        """Its spec, for every `transform_id` argument: `name@digits` and what is not default."""
        return str(self._spec)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uuid!r})"

    def errors(self) -> Failures:
        """Failures of this version, oldest first."""
        return self._client.transforms.errors(self.info.uuid)

    def statistics(self) -> TransformStatistics:
        """Totals of this version since the node started."""
        return self._client.transforms.statistics(self.info.uuid)

    def __rshift__(self, other: Part) -> "Pipeline":
        return Pipeline(self._client, [self, other])

    def __rrshift__(self, other: Part) -> "Pipeline":
        return Pipeline(self._client, [other, self])


class WDTransform(Registered):
    """A function registered at a node, to be run on every sample of a shard while it streams.

    ```python
    etl = WDTransform(client, augment, transform_name="imagenet-train", verbose=True)
    url = client.object_url("gs://imagenet", "train-000000.tar", transform_id=etl.uuid)
    ```
    """

    def __init__(
        self,
        client: Client,
        transform_func: Function,
        transform_name: str = "",
        wd_decoder: str | None = "pil",
        verbose: bool = False,
        *,
        fields: Sequence[str] | None = None,
        args: Mapping[str, object] | None = None,
        packages: Sequence[str] = (),
        env: str | None = None,
        errors: str = "skip:0.01",
        seed: int | None = None,
        probe: Probe | None = None,
    ) -> None:
        """Ship the function and register it.

        Args:
            client: The node.
            transform_func: Takes a sample (a dict) and returns one, None, or an iterable of them.
            transform_name: Default: the function's `@transform` name, else its `__name__`; a lambda must be named.
            wd_decoder: What WebDataset's `decode` would be given; None leaves fields as bytes.
            verbose: Say on standard output when registration begins and ends.
            fields: Decode only these.
            args: Keyword arguments of the function; JSON.
            packages: Requirements, e.g. `opencv-python-headless>=4.10`: the node builds an environment of these alone
                for it, or takes the one that it has built of them before.
            env: An environment of the node by name; default: the first one that fits. With packages: whose Python.
            errors: `fail`, or `skip:RATIO` to leave out failing samples within that budget.
            seed: Part of `uuid`: every read draws the same.
            probe: URI, URL or handle of a shard, to try a few samples at once.

        Raises:
            CannotShip: (A TypeError.) The function holds something that cannot leave this process.
            TransformFailed: No environment fits, or the probe failed; `traceback` is the function's own.
        """
        policy = ErrorPolicy.parse(marks_of(transform_func).get("errors", errors) if errors == "skip:0.01" else errors)
        kind = marks_of(transform_func).get("kind", "sample")
        if kind != "sample":
            raise BadRequest(f"WDTransform is for functions over samples, not of kind {kind!r}: use transforms.add")
        if verbose:
            print("Initializing ETL...", flush=True)
        info = client.transforms.add(
            transform_func,
            transform_name,
            decoder=wd_decoder,
            fields=fields,
            args=args,
            packages=packages,
            env=env,
            probe=probe,
            progress=_print_progress if verbose else None,
        )
        super().__init__(client, info, replace(Spec.parse(info.uuid), errors=policy).with_options(seed=seed))
        if probe is not None:
            _warn_if_irreproducible(info)
        if verbose:
            print(f"ETL {self.name} successfully initialized", flush=True)


class Pipeline(Registered):
    """Registered functions one after the other, in one worker, without encoding in between.

    `a >> b` is one, registered at once; of more than two parts `Pipeline(client, [a, b, c])` registers only the whole.
    """

    def __init__(self, client: Client, parts: Sequence[Part], name: str = "", *, probe: Probe | None = None) -> None:
        """Args:
        client: The node.
        parts: See `TransformsHandle.add_pipeline`. The strictest of their error policies is the pipeline's; a seed
            that one of them has is too.
        name: Default: the parts' names, joined by dots.
        probe: URI, URL or handle of a shard or object.

        Raises:
            BadRequest: (A ValueError.) The parts cannot follow one another, or have different seeds.
        """
        specs = [Spec.parse(part if isinstance(part, str) else part.uuid) for part in parts]
        seeds = {(spec.seed, spec.epoch) for spec in specs if spec.seed is not None}
        if len(seeds) > 1:
            raise BadRequest("the parts have different seeds; a pipeline has one")
        info = client.transforms.add_pipeline(parts, name, probe=probe)
        spec = Spec.parse(info.uuid)
        if info.kind == "sample":
            spec = replace(spec, errors=min((each.errors for each in specs), key=lambda policy: policy.ratio or 0.0))
        for seed, epoch in seeds:
            spec = spec.with_options(seed=seed, epoch=epoch or None)
        super().__init__(client, info, spec)
        if probe is not None:
            _warn_if_irreproducible(info)


def _warn_if_irreproducible(info: TransformInfo) -> None:
    """Called by a constructor, so that the warning names the line that calls this constructor."""
    if info.probe is not None and not info.probe.reproducible:
        warnings.warn(
            f"transform {info.uuid} gives other bytes under the same seed: it draws from something that a seed does "
            "not set (os.urandom, the clock, a generator of its own); its answers are drawn afresh and never shared",
            stacklevel=3,
        )


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
