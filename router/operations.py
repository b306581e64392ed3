"""The service for operators: what the cluster looks like from this router, and why it does what it does."""

# ruff: noqa: N802  (gRPC names the methods)

from __future__ import annotations

from functools import partial

from protos.blocks import block_hashes
from protos.convert import overview_to_proto, state_to_proto
from protos.errors import EmptyPrompt, InvalidParameter, PermissionDenied
from protos.v1 import cluster_pb2 as pb
from protos.v1 import cluster_pb2_grpc as pb_grpc
from protos.v1 import inference_pb2 as inference_pb
from router.admission import Admission
from router.calls import Calls, Context
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.pins import PinnedPrefix
from router.routing.protocol import Ask, Policy
from router.session import Session
from router.tenants import Tenant, Tenants
from router.tokenizer import Tokenizer
from router.validation import Rules, check_prompt, decode_text
from router.watch import Watch


class Operations(pb_grpc.ClusterServicer):
    """Serves `headwater.v1.Cluster`. Everybody may ask about his own prompts; the rest is for admins."""

    def __init__(
        self,
        rules: Rules,
        *,
        tokenizer: Tokenizer,
        tenants: Tenants,
        admission: Admission,
        fleet: Fleet,
        dispatcher: Dispatcher,
        policy: Policy,
        calls: Calls,
        watch: Watch,
        router_id: str,
    ) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._tenants = tenants
        self._admission = admission
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._policy = policy
        self._calls = calls
        self._watch = watch
        self._router_id = router_id

    async def GetTopology(self, request: pb.GetTopologyRequest, context: Context) -> pb.GetTopologyResponse:
        """Every member, and what waits here."""
        return await self._calls.answer("GetTopology", context, self._topology)

    async def GetOverview(self, request: pb.GetOverviewRequest, context: Context) -> pb.GetOverviewResponse:
        """As of the last full second."""
        return await self._calls.answer("GetOverview", context, self._overview)

    async def ExplainRoute(self, request: pb.ExplainRouteRequest, context: Context) -> pb.ExplainRouteResponse:
        """As a Generate of the same caller would be routed now."""
        return await self._calls.answer("ExplainRoute", context, partial(self._explain, request))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Of this router's work only: ask every router."""
        return await self._calls.answer("Drain", context, partial(self._drain, request))

    async def PinPrefix(self, request: pb.PinPrefixRequest, context: Context) -> pb.PinPrefixResponse:
        """By this router only: ask every router."""
        return await self._calls.answer("PinPrefix", context, partial(self._pin, request))

    async def UnpinPrefix(self, request: pb.UnpinPrefixRequest, context: Context) -> pb.UnpinPrefixResponse:
        """Of the caller's own."""
        return await self._calls.answer("UnpinPrefix", context, partial(self._unpin, request))

    async def ListPins(self, request: pb.ListPinsRequest, context: Context) -> pb.ListPinsResponse:
        """The caller's own."""
        return await self._calls.answer("ListPins", context, self._list_pins)

    async def _overview(self, tenant: Tenant) -> pb.GetOverviewResponse:
        _check_admin(tenant)
        return overview_to_proto(self._watch.overview)

    async def _topology(self, tenant: Tenant) -> pb.GetTopologyResponse:
        _check_admin(tenant)
        dispatcher, model = self._dispatcher, self._fleet.model
        waiting = dispatcher.waiting_work
        names = sorted({*dispatcher.running, *dispatcher.waiting})
        tenants = [
            pb.TenantQueue(tenant=name, num_waiting=dispatcher.waiting[name], num_running=dispatcher.running[name])
            for name in names
        ]
        return pb.GetTopologyResponse(
            router_id=self._router_id,
            model="" if model is None else model.name,
            workers=[self._worker(session) for session in self._fleet.sessions],
            queue=pb.Queue(num_requests=dispatcher.num_waiting, num_tokens=waiting.prefill_tokens, tenants=tenants),
            policy=self._policy.name,
        )

    def _worker(self, session: Session) -> pb.Worker:
        load, reserved = session.load, session.reservations.total
        return pb.Worker(
            worker_id=session.worker_id,
            address=session.address,
            state=state_to_proto(session.state),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            pending_prefill_tokens=load.pending_prefill_tokens,
            kv_used_tokens=load.kv_used_tokens,
            kv_capacity_tokens=load.kv_capacity_tokens,
            reserved_outputs=reserved.num_outputs,
            reserved_prefill_tokens=reserved.prefill_tokens,
            reserved_decode_tokens=reserved.decode_tokens,
            known_cached_tokens=self._fleet.index.num_known(session.worker_id) * self._fleet.page_size,
        )

    async def _explain(self, request: pb.ExplainRouteRequest, tenant: Tenant) -> pb.ExplainRouteResponse:
        self._rules.check_model(request.model)
        token_ids, model = await self._token_ids(request), self._fleet.model
        if model is None:
            return pb.ExplainRouteResponse(prompt_tokens=len(token_ids))
        check_prompt("the prompt", token_ids, model)
        params = inference_pb.SamplingParams(max_tokens=request.max_tokens if request.HasField("max_tokens") else None)
        sampling = self._rules.resolve(params, num_prompt_tokens=len(token_ids), model=model)
        salt, size = self._tenants.cache_salt(tenant), self._fleet.page_size
        hashes = block_hashes(salt, token_ids, size) if size else []
        [key] = hashes[:1] or block_hashes(salt, token_ids, len(token_ids))
        return self._explained(Ask(len(token_ids), sampling.max_tokens, 1, key), hashes)

    def _explained(self, ask: Ask, hashes: list[int]) -> pb.ExplainRouteResponse:
        explanation = self._dispatcher.explain(ask, hashes)
        candidates = [
            pb.RouteCandidate(
                worker_id=estimate.worker_id,
                cost=estimate.cost,
                cached_tokens=estimate.cached_tokens,
                live_tokens=estimate.live_tokens,
                load_tokens=estimate.load_tokens,
                fetchable_tokens=estimate.fetchable_tokens,
                has_room=has_room,
            )
            for estimate, has_room in explanation.candidates
        ]
        return pb.ExplainRouteResponse(
            worker_id=candidates[0].worker_id if candidates else "",
            reason=explanation.reason,
            prompt_tokens=ask.num_tokens,
            candidates=candidates,
        )

    async def _pin(self, request: pb.PinPrefixRequest, tenant: Tenant) -> pb.PinPrefixResponse:
        self._rules.check_model(request.model)
        token_ids = await self._token_ids(request)
        check_prompt("the prefix", token_ids, await self._admission.model())
        pin = self._fleet.pin(tenant.name, self._tenants.cache_salt(tenant), token_ids)
        return pb.PinPrefixResponse(pin=self._pin_message(pin))

    async def _unpin(self, request: pb.UnpinPrefixRequest, tenant: Tenant) -> pb.UnpinPrefixResponse:
        return pb.UnpinPrefixResponse(found=self._fleet.unpin(tenant.name, request.pin_id))

    async def _list_pins(self, tenant: Tenant) -> pb.ListPinsResponse:
        return pb.ListPinsResponse(pins=map(self._pin_message, self._fleet.pins.of(tenant.name)))

    def _pin_message(self, pin: PinnedPrefix) -> pb.PinnedPrefix:
        num_workers = sum(self._fleet.has(session.worker_id, pin) for session in self._fleet.sessions)
        return pb.PinnedPrefix(pin_id=pin.pin_id, num_tokens=len(pin.token_ids), num_workers=num_workers)

    async def _token_ids(self, request: pb.ExplainRouteRequest | pb.PinPrefixRequest) -> tuple[int, ...]:
        """The ids of whichever of text and tokens was given. Raises EmptyPrompt if neither was."""
        token_ids = tuple(request.tokens.ids)
        if request.text:
            token_ids = await self._tokenizer.encode(decode_text("the prompt", request.text))
        if not token_ids:
            raise EmptyPrompt("the prompt is empty; give at least one character of text or one token id")
        return token_ids

    async def _drain(self, request: pb.DrainRequest, tenant: Tenant) -> pb.DrainResponse:
        _check_admin(tenant)
        session = self._fleet.session(request.worker_id)
        if session is None:
            known = ", ".join(session.worker_id for session in self._fleet.sessions) or "none"
            raise InvalidParameter(f"there is no worker {request.worker_id!r}; those known here: {known}")
        session.hold(not request.resume)
        return pb.DrainResponse(num_live=session.num_live)


def _check_admin(tenant: Tenant) -> None:
    """Raises PermissionDenied unless the caller is an admin."""
    if not tenant.is_admin:
        raise PermissionDenied(f"{tenant.name} may not do this; ask with the key of a tenant with is_admin")
