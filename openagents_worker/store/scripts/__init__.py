"""Scripts: the only place where Python calls Lua scripts, with one typed function for each script.

A script function takes keyword arguments and returns a `ScriptCall`. Its return type is the reply of the
script. The Lua code that reads the arguments and orders the fields of the reply is generated from the
signature. `store/lua/NAME.lua` describes what each script does.
"""

from __future__ import annotations

from openagents_worker.store.scripts.attempt import (
    MAX_RECOVERIES,
    PAGE_BYTES,
    ClaimAnswer,
    Claimed,
    ReleaseKind,
    SuspendKind,
    WriteAnswer,
    WriteResult,
    claim,
    commit,
    emit,
    finish,
    page,
    release,
    suspend,
)
from openagents_worker.store.scripts.calls import ScriptCall
from openagents_worker.store.scripts.control import (
    CancelAnswer,
    Cancelled,
    DeleteAnswer,
    Deleted,
    ResumeAnswer,
    Resumed,
    cancel,
    delete_session,
    resume,
)
from openagents_worker.store.scripts.maintenance import (
    Pruned,
    aside_news,
    lacking,
    mend_key,
    prune,
    put_aside,
)
from openagents_worker.store.scripts.outbox import RunEnd, Taken, outbox_done, outbox_take
from openagents_worker.store.scripts.sending import confirm_completion, replaced, resend, resend_unread, wake
from openagents_worker.store.scripts.source import Script
from openagents_worker.store.scripts.submission import SubmitAnswer, Submitted, reject, submit
from openagents_worker.store.scripts.wakes import Wake, Woken, WokenRuns
from openagents_worker.store.scripts.workers import (
    FalseAlarm,
    LookResult,
    Reclaimed,
    Registration,
    Renewal,
    accuse,
    alarm,
    confirm_notices,
    end_lease,
    look,
    notify,
    reclaim,
    register,
    renew,
    retire,
)

__all__ = [
    "CancelAnswer",
    "Cancelled",
    "ClaimAnswer",
    "Claimed",
    "DeleteAnswer",
    "Deleted",
    "FalseAlarm",
    "LookResult",
    "MAX_RECOVERIES",
    "PAGE_BYTES",
    "Pruned",
    "Reclaimed",
    "Registration",
    "ReleaseKind",
    "Renewal",
    "ResumeAnswer",
    "Resumed",
    "RunEnd",
    "Script",
    "ScriptCall",
    "SubmitAnswer",
    "Submitted",
    "SuspendKind",
    "Taken",
    "Wake",
    "Woken",
    "WokenRuns",
    "WriteAnswer",
    "WriteResult",
    "accuse",
    "alarm",
    "aside_news",
    "cancel",
    "claim",
    "commit",
    "confirm_completion",
    "confirm_notices",
    "delete_session",
    "emit",
    "end_lease",
    "finish",
    "lacking",
    "look",
    "mend_key",
    "notify",
    "outbox_done",
    "outbox_take",
    "page",
    "prune",
    "put_aside",
    "reclaim",
    "register",
    "reject",
    "release",
    "renew",
    "replaced",
    "resend",
    "resend_unread",
    "resume",
    "retire",
    "submit",
    "suspend",
    "wake",
]
