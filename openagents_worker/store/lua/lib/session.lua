--#include run
--#include records
--#include readers
--#include index
-- The order of runs in a session: one holder, the others wait in order. A run enters at submit, or when a delayed run becomes due.
local function session_keys(S)
  return {k.session(S), k.session_queue(S), k.transcript(S), k.artifacts(S), k.session_state(S)}
end

-- kept_keys(S): the keys of a session in which no run works or waits; an empty queue does not exist
local function kept_keys(S) return {k.session(S), k.transcript(S), k.artifacts(S), k.session_state(S)} end

-- is_unused(S): whether no run works or waits in the session
local function is_unused(S) return not redis.call('HGET', k.session(S), 'holder') and redis.call('ZCARD', k.session_queue(S)) == 0 end

-- session_format(S): the format that a worker must be able to read to execute a run of the session
local function session_format(S) return tonumber(redis.call('HGET', k.session(S), 'format')) or 0 end

-- A shared child works in the session of its parent while the parent is parked. Then the child is the holder, and the field `below:CHILD` of the
-- session is the parent, which becomes the holder again when the child ends.

-- lends(run): whether this run below the holder has lent the session. One that has ended meanwhile has not, even if it was resumed: then it stands
-- in the queue of the session
local function lends(run) return run ~= nil and (PARKED[run.state] or run.state == STATE.queued) end

-- given_back(S): the run below the holder becomes the holder; nil if none has lent the session. That run may have been woken or interrupted
-- meanwhile: then the second value is its wake-up
local function given_back(S)
  local held = redis.call('HGET', k.session(S), 'holder')
  local below = held and redis.call('HGET', k.session(S), 'below:' .. held)
  while below do
    redis.call('HDEL', k.session(S), 'below:' .. held)
    local run = load(below)
    if lends(run) then
      redis.call('HSET', k.session(S), 'holder', below)
      if PARKED[run.state] and run.cancel == '1' then
        redis.call('HSET', k.run(below), 'state', STATE.queued)
        redis.call('HDEL', k.run(below), 'waits')
        redis.call('ZREM', k.timeouts(), below)
        run.state = STATE.queued
      end
      return run, run.state == STATE.queued and wake_of(run) or nil
    end
    held, below = below, redis.call('HGET', k.session(S), 'below:' .. below)
  end
end

-- lowest(S, R): the lowest run of the stack under the holder R that has lent the session; R itself if there is none
local function lowest(S, R)
  local found, below = R, redis.call('HGET', k.session(S), 'below:' .. R)
  while below do
    if lends(load(below)) then found = below end
    below = redis.call('HGET', k.session(S), 'below:' .. below)
  end
  return found
end

-- epoch_of(S): how often a summary has replaced the oldest messages of the transcript. The messages stay in the list, so positions in it stay
-- valid: for runs that are resumed or forked, and for readers. compacted:E is the number of messages that the summary compaction:E stands for.
local function epoch_of(S) return count_of(redis.call('HGET', k.session(S), 'epoch')) end

-- promote(S): the head of the queue becomes the holder; returns its wake-up, or nil if no run waits
local function promote(S)
  while true do
    local head = redis.call('ZRANGE', k.session_queue(S), 0, 0)[1]
    if not head then
      redis.call('HDEL', k.session(S), 'holder')
      return nil
    end
    local run = load(head)
    if run and not TERMINAL[run.state] then
      redis.call('HSET', k.session(S), 'holder', head)
      redis.call('HSET', k.run(head), 'state', STATE.queued)
      redis.call('ZREM', k.session_queue(S), head)
      append(run, {'run.queued', queued_payload(run)})
      return wake_of(run)
    end
    redis.call('ZREM', k.session_queue(S), head) -- its record is deleted, or it has ended
  end
end

local FRONT = -2 ^ 40 -- the ordinals of interrupting runs begin here, those of other runs at 1
local SHARED = -2 ^ 41 -- those of shared children: they are in front of all others

-- is_lent_to(R): whether the run is a shared child for which its parent waits. A shared child that somebody else has resumed works in the session
-- like any other run
local function is_lent_to(R) return field_of(R, 'mode') == 'shared' and field_of(R, 'parent_life') ~= nil end

local HOLDS_TURNS = 5 -- the format of a run that may hold turns of its children, and of these children, see store/formats.py

-- begin_shared(run): the next shared child of a parked run gets the session; returns its wake-up, or nil if no such child waits. Children of a
-- run further down may wait in front of it
local function begin_shared(run)
  local S = run.session
  if not PARKED[run.state] or redis.call('HGET', k.session(S), 'holder') ~= run.id then return nil end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', k.session_queue(S), '-inf', '(' .. digits(FRONT))) do
    local child = field_of(id, 'parent') == run.id and is_lent_to(id) and load(id)
    if child and child.state == STATE.waiting_session then
      redis.call('HSET', k.session(S), 'holder', id, 'below:' .. id, run.id)
      redis.call('HSET', k.run(id), 'state', STATE.queued, 'format', math.max(child.format, run.format)) -- it must read what the run holds
      redis.call('ZREM', k.session_queue(S), id)
      append(child, {'run.queued', queued_payload(child)})
      return wake_of(child)
    end
  end
end

-- passed_on(S): the run below the holder, or the head of the queue, becomes the holder; returns its wake-up, or nil if no run must be woken
local function passed_on(S)
  local back, wake = given_back(S)
  if not back then return promote(S) end
  return wake or begin_shared(back)
end

-- holder(S, R): the holder, or nil; a run without a record does not count. The caller knows that the run R has one
local function holder(S, R)
  local id = redis.call('HGET', k.session(S), 'holder')
  if id and (id == R or is_known(id)) then return id end
  return nil
end

-- repaired(S): if the record of the holder is deleted, the head of the queue becomes the holder; returns its wake-up
local function repaired(S)
  local id = redis.call('HGET', k.session(S), 'holder')
  if id and not is_known(id) then return passed_on(S) end
  return nil
end

-- look_in_time(run): a run that expires is checked at that time
local function look_in_time(run)
  if run.expires > 0 and run.attempt == 0 then redis.call('ZADD', k.due(), digits(run.expires), run.id) end
end

-- ordinal_of(run): its place in the queue: at the end. A run that interrupts others is in front of the runs that do not, in order of arrival
local function ordinal_of(run)
  local S = run.session
  if is_lent_to(run.id) then return SHARED + count_up(k.session(S), 'front') end
  if run.on_busy ~= '' then return FRONT + count_up(k.session(S), 'front') end
  local last = redis.call('ZRANGE', k.session_queue(S), -1, -1, 'WITHSCORES')[2]
  local ordinal = count_up(k.session(S), 'ordinal')
  if last and ordinal <= tonumber(last) and tonumber(last) < MOST then ordinal = count_up(k.session(S), 'ordinal', digits(math.floor(last - ordinal + 1))) end
  return ordinal
end

-- place(run): the run enters its session; returns its wake-up if it becomes the holder, else nil.
-- If it already is the holder, its record was lost and it was submitted again.
local function place(run)
  local S = run.session
  look_in_time(run)
  local held = holder(S)
  list_in(SESSIONS, S)
  for _, key in ipairs(session_keys(S)) do redis.call('PERSIST', key) end
  if held == run.id or not held and redis.call('ZCARD', k.session_queue(S)) == 0 then
    redis.call('HSET', k.session(S), 'holder', run.id)
    redis.call('HSET', k.run(run.id), 'state', STATE.queued)
    append(run, {'run.queued', queued_payload(run)})
    return wake_of(run)
  end
  redis.call('ZADD', k.session_queue(S), digits(ordinal_of(run)), run.id)
  redis.call('HSET', k.run(run.id), 'state', STATE.waiting_session)
  local position = redis.call('ZRANK', k.session_queue(S), run.id) + 1
  append(run, {'run.waiting_session', '{"position":' .. digits(position) .. '}'})
  if not held then return passed_on(S) end
  return nil
end
