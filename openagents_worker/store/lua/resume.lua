-- Continues a failed or cancelled run in a new life, from its last checkpoint, at the end of the queue of its session. A run that ended before its
-- first checkpoint starts again. NO_CHECKPOINT if that might repeat an effect (it is not durable and was executed, or its records are deleted), or
-- if it has no request.
-- `input_text` is a digest, '' if the caller does not name its input. The task options (`canvas`) of this call replace earlier ones. Returns `Resumed`. Event run.resumed, then run.queued or run.waiting_session.
--#include revived
-- input_digest(): the digest of the input of the run. The previous version stores none; then its request is plain JSON
local function input_digest()
  local known = field_of(run_id, 'input_digest')
  if known and known ~= '' then return known end
  local request = decoded(field_of(run_id, 'request') or '')
  return request and type(request.input_text) == 'string' and redis.sha1hex(request.input_text) or ''
end

local run = load(run_id)
if not run then return reply{answer = 'UNKNOWN'} end
if run.agent ~= agent_id then return reply{answer = 'OTHER_AGENT', detail = run.agent} end
if run.session ~= session_id then return reply{answer = 'OTHER_SESSION', detail = run.session} end
needs(k.journal(run_id), 'list')
needs(k.facts(run_id), 'hash')
if input_text ~= '' and input_text ~= input_digest() then return reply{answer = 'OTHER_INPUT'} end
local latest = run_id .. ':step:' .. digits(run.steps)
if checkpoint_id ~= '' and checkpoint_id ~= latest then return reply{answer = 'OTHER_CHECKPOINT', detail = latest} end
if run.state == STATE.completed then return reply{answer = 'COMPLETED'} end
if not TERMINAL[run.state] then return reply{answer = 'LIVE', state = run.state, queue = run.queue} end
local begins = redis.call('EXISTS', k.journal(run_id)) == 0
if begins and not may_begin_again(run) then return reply{answer = 'NO_CHECKPOINT'} end

if canvas ~= '' then
  redis.call('HSET', k.run(run_id), 'canvas', canvas)
  run.canvas = canvas
end
local wake = revived(run, begins, by)
local state = redis.call('HGET', k.run(run_id), 'state')
local is_own = wake and wake.run_id == run_id -- else the session was repaired: the head of its queue must be woken
return reply{answer = 'OK', state = state, queue = run.queue, canvas = run.canvas, sent_us = is_own and wake.sent_us or nil,
  also = not is_own and wake and {wake} or {}}
