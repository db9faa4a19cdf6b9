--#include run
--#include records
-- Finds the run that kills its worker processes, by bisection. When a process dies, its runs without a new record since their claim become
-- suspects: half of them form one group, half another. Runs that already were a group of suspects are halved separately.
-- A process executes suspects of one group only, beside any number of other runs. So each death halves the group with the run that kills. A death
-- counts (`stuck`) only for a run that was the single suspect of its process.
-- After too many deaths, the run is poisoned only if it was the only run of the process, or if the watchdog named it. Any other run of the process
-- may have killed it, also one with a record: its memory may grow in each attempt until the kernel ends the process. So the death is in doubt
-- (`doubted`), and the suspect is executed alone from then on: only a process without other runs executes it, and that process takes no other run,
-- for MOST_ALONE_MS at most. The process that has died is usually replaced by an empty one: for EMPTY_WITHIN_MS, empty processes are kept free for
-- the suspect. If none is found, it is executed in company again, and poisoned after MOST_DOUBTED such deaths (deaths.lua), because a run that kills
-- must end. A worker of the previous version neither keeps a process free nor writes `doubted`; then the limit counts from the start.
-- A record removes all suspicion. If the lease ended without a death (the process answers again, other leases ended within a heartbeat, or the
-- watchdog named another run), no suspicion is added, at most three times in a row without a record.
local SUSPECTS_KEPT_MS = 86400000 -- a worker of the previous version does not delete the set when it reclaims runs
local EMPTY_WITHIN_MS = 60000 -- a suspect waits so long for an empty process, from the first claim that finds it waiting
local MOST_ALONE_MS = 600000 -- then its process takes other runs again. A model call may last as long (`total_timeout_ms`)
local BUSY_MS, BUSY_LONGEST_MS = 1000, 5000 -- a run that this process does not take is due again after so long

-- sound(held): a suspicion with all fields, even if the stored value is invalid
local function sound(held)
  if type(held) ~= 'table' then held = {} end
  local function text(name) return type(held[name]) == 'string' and held[name] or '' end
  return {group = text('group'), by = text('by'), at = text('at'), halved = whole(held.halved), spared = whole(held.spared),
    named = whole(held.named), doubted = whole(held.doubted)}
end

-- suspicion_of(run): group ('': none), halved (deaths with other suspects in the process), spared (in a row), named (by the watchdog), by (the
-- incarnation that died), doubted (deaths in company after which it is executed alone instead of being poisoned). A worker of the previous version
-- stores none for runs that died twice: such a run is a group with one member.
local function suspicion_of(run)
  if run.suspicion == '' and run.stuck < 2 then return {group = '', halved = 0, spared = 0, named = 0, by = '', doubted = 0} end
  local at = digits(run.life) .. ':' .. digits(journal_length(run.id))
  local held = run.suspicion ~= '' and sound(decoded(run.suspicion)) or {}
  if held.at == at then return held end
  return sound{group = run.stuck >= 2 and run.id or nil}
end

-- suspect_in(I): a suspect that the worker executes, and its suspicion; nil for none
local function suspect_in(incarnation)
  while true do
    local id = redis.call('SRANDMEMBER', k.suspects(incarnation))
    if not id then return nil end
    local run = load(id)
    local held = run and run.owner == incarnation and suspicion_of(run)
    if held and held.group ~= '' then return run, held end
    redis.call('SREM', k.suspects(incarnation), id) -- a worker of the previous version has reclaimed it
  end
end

-- waits_for_empty(R): whether the suspect waits for an empty process. The first call starts the time
local function waits_for_empty(id)
  local until_ms = tonumber(redis.call('ZSCORE', k.alone(), id))
  if not until_ms or until_ms > NOW_MS + EMPTY_WITHIN_MS then
    until_ms = NOW_MS + EMPTY_WITHIN_MS
    redis.call('ZADD', k.alone(), digits(until_ms), id)
    redis.call('PEXPIRE', k.alone(), SUSPECTS_KEPT_MS)
  end
  return until_ms > NOW_MS
end

-- is_kept_free(queue): whether a process that is empty is kept free for a suspect of this queue, which comes within seconds
local function is_kept_free(queue)
  local is_kept = false
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', k.alone(), digits(NOW_MS), '+inf', 'LIMIT', 0, 20)) do
    local run = load(id)
    if not run or run.owner ~= '' or TERMINAL[run.state] or suspicion_of(run).doubted == 0 then
      redis.call('ZREM', k.alone(), id)
    elseif run.queue == queue and (run.state == STATE.queued or (run.state == STATE.retrying and run.due <= NOW_MS + 2 * BUSY_MS)) then
      is_kept = waits_for_empty(id) or is_kept
    end
  end
  return is_kept
end

-- is_empty(I): whether the worker executes no run
local function is_empty(incarnation) return redis.call('EXISTS', k.worker_runs(incarnation)) == 0 end

-- busy_ms(run, held, I): how long the run has to wait because of suspects, itself or others; nil if the worker may execute it
local function busy_ms(run, held, incarnation)
  local other, of_other = suspect_in(incarnation)
  if other then
    if held.group ~= '' and held.group ~= of_other.group then return BUSY_MS end
    local since_ms = NOW_MS - whole(other.claimed)
    if of_other.doubted > 0 and since_ms < MOST_ALONE_MS and redis.call('SCARD', k.worker_runs(incarnation)) == 1 then
      return math.min(math.max(since_ms, BUSY_MS), BUSY_LONGEST_MS)
    end
  end
  if held.doubted > 0 then return not is_empty(incarnation) and waits_for_empty(run.id) and BUSY_MS or nil end
  return redis.call('EXISTS', k.alone()) == 1 and is_empty(incarnation) and is_kept_free(run.queue) and BUSY_MS or nil
end

-- begins(run, held, I): the worker claims a suspect
local function begins(run, held, incarnation)
  redis.call('SADD', k.suspects(incarnation), run.id)
  redis.call('PEXPIRE', k.suspects(incarnation), SUSPECTS_KEPT_MS)
  if held.doubted > 0 then redis.call('ZREM', k.alone(), run.id) end
end
