--#include session
-- Held turns: what a shared child leaves in its session is held by its parent, until the parent writes to the session itself. The list `held` of the
-- parent has an item for each part of a turn. The first letter of an item says what it is: `m` a message, `a` an artifact, `s` the name of a key of
-- the session state and `v` its value, `g` the name of a key that is removed, `t` the end of the turn of this call (store/held_turns.py).
-- The field `held_from` of the parent is the number of the items whose messages and artifacts are written already. The changes of the state are not
-- written from here: those that a completed run writes include them.
-- A turn that is handed on is stored once for each level. The copies below expire with their runs: grandchildren that somebody resumes, and forks,
-- read what they saw from there.
local PAGE_ITEMS = 100 -- so many are read at once: each of them may have a megabyte

-- held_range(R): the positions of the messages and artifacts to write: the first one, and the one behind the last
local function held_range(R) return count_of(field_of(R, 'held_from')), redis.call('LLEN', k.held(R)) end

-- each_held(R, from, take, to): calls take(kind, text, item, position) for the items from a position on, until the end or before another position
local function each_held(R, from, take, to)
  to = to or redis.call('LLEN', k.held(R))
  for first = from, to - 1, PAGE_ITEMS do
    for i, item in ipairs(redis.call('LRANGE', k.held(R), first, math.min(first + PAGE_ITEMS, to) - 1)) do
      take(string.sub(item, 1, 1), string.sub(item, 2), item, first + i - 1)
    end
  end
end

-- held_is_written(R): what the run holds is in the session now, or its own parent holds it
local function held_is_written(R)
  local length = redis.call('LLEN', k.held(R))
  if length > 0 then redis.call('HSET', k.run(R), 'held_from', length) end
end

-- write_held(R, S, from, to): writes the messages and artifacts that the run holds into the session S: those between two positions, or those that
-- are not written yet
local function write_held(R, S, from, to)
  each_held(R, from or (held_range(R)), function(kind, text)
    if kind == 'm' then redis.call('RPUSH', k.transcript(S), text) end
    if kind == 'a' then redis.call('RPUSH', k.artifacts(S), text) end
  end, to)
end

-- change_held_state(R, S, to): makes the changes of the state that the run holds in the state of the session S, a copy
local function change_held_state(R, S, to)
  local name
  each_held(R, 0, function(kind, text)
    if kind == 's' then name = text end
    if kind == 'v' then redis.call('HSET', k.session_state(S), name, text) end
    if kind == 'g' then redis.call('HDEL', k.session_state(S), text) end
  end, to)
end

-- hold(run, turn): the parent of a shared child holds its turn: the messages and artifacts that the child itself holds, then the items `turn`. If the
-- record of the parent is deleted, nobody will write the turn
local function hold(run, turn)
  local id, call = unpack(redis.call('HMGET', k.run(run.id), 'parent', 'parent_call'))
  local parent = load(id)
  if not parent then return end
  local length = redis.call('LLEN', k.held(id))
  each_held(run.id, (held_range(run.id)), function(kind, _, item)
    if kind == 'm' or kind == 'a' then redis.call('RPUSH', k.held(id), item) end
  end)
  for _, item in ipairs(turn) do redis.call('RPUSH', k.held(id), item) end
  if redis.call('LLEN', k.held(id)) == length then return end
  redis.call('RPUSH', k.held(id), 't' .. call)
  if parent.format < HOLDS_TURNS then redis.call('HSET', k.run(id), 'format', HOLDS_TURNS) end
  if TERMINAL[parent.state] then redis.call('PEXPIRE', k.held(id), RUN_TTL_MS) end -- its next life may want it
end

-- stack_of(run): the ids of the runs that have lent the session, the lowest one first, and the run itself at the end
local function stack_of(run)
  local ids, id = {}, run.id
  while id do
    table.insert(ids, 1, id)
    id = redis.call('HGET', k.session(run.session), 'below:' .. id)
  end
  return ids
end
