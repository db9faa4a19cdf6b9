-- Takes the runs of one worker whose lease is over, at most `limit` in a call. Returns `Reclaimed`
-- suspects.lua decides which of the runs may have killed the worker. If several leases end within `heartbeat_ms`, Redis was unreachable, and no
-- run is suspected. Event run.recovered; for a run that ends: its terminal events.
--#include end_run
--#include deaths
--#include early
local dead = redis.call('ZRANGEBYSCORE', k.workers(), '-inf', digits(NOW_MS), 'WITHSCORES', 'LIMIT', 0, 1)
if not dead[1] then return reply{wakes = {}, incarnation = '', left = 0} end
local incarnation, over_since = dead[1], tonumber(dead[2])
local ended = end_of(incarnation, over_since)
local age_ms = math.min(NOW_MS - over_since, NOW_MS) -- an invalid lease may have ended at any time
local wakes = {}
local seen_by = redis.call('HGET', k.gone(incarnation), '')
local counted = seen_by == FALSE_ALARM and 0 or 1
local ids = redis.call('SRANDMEMBER', k.worker_runs(incarnation), limit)
table.sort(ids)
for _, id in ipairs(ids) do
  local run = load(id)
  if run and run.owner == incarnation and run.state == STATE.running then
    local is_poison = blame(run, ended)
    local fence = next_fence(run)
    redis.call('HSET', k.run(id), 'state', STATE.queued, 'fence', fence, 'owner', '', 'recoveries', run.recoveries + counted, 'stuck', run.stuck,
      'suspicion', run.suspicion)
    if seen_by then redis.call('HSET', k.gone(incarnation), id, digits(run.life)) end
    append(run, {'run.recovered', '{"previous_worker":' .. q(incarnation) .. ',"age_ms":' .. digits(age_ms)
      .. ',"recoveries":' .. digits(run.recoveries + counted) .. (not is_poison and suspicion_of(run).doubted > 0 and ',"alone":true' or '')
      .. '}'})
    leave(run)
    run.fence, run.owner = fence, ''
    local more
    if says_so_itself(run) then
      more = {wake_of(run)}
    elseif run.cancel == '1' then
      more = cancelled(run, run.cancel_reason)
    elseif run.durable == '0' then
      more = end_run(run, foreign_ending(run, STATE.failed, 'failed', 'worker.lost', 'the worker that executed this run died, and the run is not durable'))
    elseif is_poison then
      append(run, {'run.poisoned', '{"recoveries":' .. digits(run.deaths or run.stuck) .. '}'})
      more = end_run(run, foreign_ending(run, STATE.failed, 'failed', 'run.poisoned', 'the run killed its workers ' .. digits(run.deaths or run.stuck)
        .. ' times without a committed step in between', 'check what its next recorded call does to the worker process'))
    else
      more = {wake_of(run)}
    end
    for _, wake in ipairs(more) do wakes[#wakes + 1] = wake end
  else
    redis.call('SREM', k.worker_runs(incarnation), id)
  end
end
local left = redis.call('SCARD', k.worker_runs(incarnation))
if left == 0 then
  forget_connection(incarnation)
  forget_fleet(incarnation)
  redis.call('ZREM', k.workers(), incarnation)
  redis.call('DEL', k.worker_runs(incarnation), k.worker_box(incarnation), k.worker_suspect(incarnation), k.suspects(incarnation))
end
return reply{wakes = wakes, incarnation = incarnation, left = left, age_ms = digits(age_ms)}
