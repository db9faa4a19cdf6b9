--#include suspects
-- Which runs become suspects when the lease of their worker ends. `suspects.lua` describes the method.
local MOST_SPARED = 3 -- in a row without a record
local MOST_DOUBTED = 3 -- deaths in company of a suspect that should be executed alone; see suspects.lua
local KEPT_AFTER_LEASE_MS = 600000 -- information about the end of a lease is kept for this time; a process that answers later has no effect
local LEASES_KEPT = 1000

local function write_suspicion(run, held)
  held.at = digits(run.life) .. ':' .. digits(journal_length(run.id))
  run.suspicion = cjson.encode(held)
end

-- spare_all(I): the process did not die; restores the suspicion that its runs had before
local function spare_all(incarnation)
  local blamed = redis.call('HGETALL', k.lease_end_runs(incarnation))
  for i = 1, #blamed, 2 do
    local run = load(blamed[i])
    local held = run and not TERMINAL[run.state] and suspicion_of(run)
    if held and held.by == incarnation and held.spared < MOST_SPARED then
      local before = decoded(blamed[i + 1]) or {}
      before = {stuck = whole(before.stuck), held = sound(before.held)}
      before.held.spared = before.held.spared + 1
      write_suspicion(run, before.held)
      redis.call('HSET', k.run(run.id), 'stuck', before.stuck, 'suspicion', run.suspicion)
      if before.held.group == '' and run.owner ~= '' then redis.call('SREM', k.suspects(run.owner), run.id) end
    end
  end
  redis.call('DEL', k.lease_end_runs(incarnation))
end

-- answers(I): the process has lost its lease, but reports that it is alive
local function answers(incarnation)
  redis.call('HSET', k.lease_end(incarnation), 'answered', '1')
  redis.call('PEXPIRE', k.lease_end(incarnation), KEPT_AFTER_LEASE_MS)
  spare_all(incarnation)
end

-- were_lost_together(I, at): whether other leases ended within a heartbeat of this one, of processes that are not known to be dead
local function were_lost_together(incarnation, at)
  local found = false
  if heartbeat_ms == 0 then return false end
  for _, key in ipairs({k.workers(), k.lost_leases()}) do
    local to = math.min(at + heartbeat_ms, NOW_MS)
    for _, other in ipairs(redis.call('ZRANGEBYSCORE', key, digits(at - heartbeat_ms), digits(to))) do
      if other ~= incarnation and redis.call('HEXISTS', k.lease_end(other), 'died') == 0 then
        found = true
        spare_all(other)
      end
    end
  end
  return found
end

-- end_of(I, at): information about the end of a lease. The first call stores the number of its runs and suspects
local function end_of(incarnation, at)
  local key = k.lease_end(incarnation)
  if redis.call('HEXISTS', key, 'carried') == 0 then
    redis.call('HSET', key, 'carried', redis.call('SCARD', k.worker_runs(incarnation)),
      'suspects', redis.call('SCARD', k.suspects(incarnation)))
    redis.call('PEXPIRE', key, KEPT_AFTER_LEASE_MS)
    redis.call('ZADD', k.lost_leases(), digits(at), incarnation)
    redis.call('ZREMRANGEBYRANK', k.lost_leases(), 0, -LEASES_KEPT - 1)
    redis.call('PEXPIRE', k.lost_leases(), KEPT_AFTER_LEASE_MS)
  end
  local owned, suspects, answered, named, died = unpack(redis.call('HMGET', key, 'carried', 'suspects', 'answered', 'named', 'died'))
  local nobody_died = answered or (not died and (blameless == 1 or were_lost_together(incarnation, at)))
  local half = redis.call('SCARD', k.worker_runs(incarnation)) % 2
  return {incarnation = incarnation, named = named, nobody_died = nobody_died,
    is_only_run = owned == '1', is_single = {n = owned == '1', s = suspects == '1'}, half = {n = half, s = half}}
end

-- has_new_record(run): whether a record was committed since the claim; nil if a worker of the previous version has claimed it
local function has_new_record(run)
  local attempt, length = string.match(field_of(run.id, 'claimed_at') or '', '^(%d+):(%d+)$')
  if tonumber(attempt) ~= run.attempt then return nil end
  return journal_length(run.id) > tonumber(length)
end

-- blame(run, ended): updates run.stuck and run.suspicion after the end of its worker. Returns whether the run is poisoned
local function blame(run, ended)
  local recorded, is_named = has_new_record(run), ended.named == run.id
  if recorded and not is_named then
    run.suspicion = ''
    return false
  end
  local held, before = suspicion_of(run), cjson.encode({stuck = run.stuck, held = suspicion_of(run)})
  if (ended.nobody_died or (ended.named and not is_named)) and held.spared < MOST_SPARED then
    held.spared = held.spared + 1
    write_suspicion(run, held)
    return false
  end
  if recorded == nil then -- such a worker counts all deaths, and executes only one run that has died twice at a time
    run.stuck = run.stuck + 1
    return run.stuck > max_recoveries
  end
  local kind = held.group == '' and 'n' or 's'
  local is_single = is_named or ended.is_single[kind]
  if is_named then
    held.group, held.named = ended.incarnation .. ':named', held.named + 1
  else
    held.group = ended.incarnation .. ':' .. kind .. ended.half[kind]
    ended.half[kind] = 1 - ended.half[kind]
  end
  held.by = ended.incarnation
  if is_single then run.stuck = run.stuck + 1 else held.halved = held.halved + 1 end
  run.deaths = run.stuck + held.halved
  local is_poison = held.named >= 2 or (is_single and run.deaths > max_recoveries)
  if is_poison and not is_named and not ended.is_only_run and held.doubted < MOST_DOUBTED then
    is_poison, held.doubted = false, held.doubted + 1
    redis.call('ZADD', k.alone(), digits(MOST), run.id) -- it waits from the first claim on that finds it here
    redis.call('PEXPIRE', k.alone(), SUSPECTS_KEPT_MS)
  end
  write_suspicion(run, held)
  redis.call('HSET', k.lease_end_runs(ended.incarnation), run.id, before)
  redis.call('PEXPIRE', k.lease_end_runs(ended.incarnation), KEPT_AFTER_LEASE_MS)
  return is_poison
end
