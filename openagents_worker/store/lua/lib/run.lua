--#include time
-- The record of a run and its events. A script that changes the state also writes the event.
local MOST = 2 ^ 53 -- the largest integer that a Lua number represents exactly

-- count_of(text): a counter of a record; a value that is not a whole number (another program may have written it) counts as 0
local function count_of(text)
  local number = tonumber(text)
  return number and number >= 0 and number <= MOST and number % 1 == 0 and number or 0
end

-- mend(R, name): replaces a counter that is not a whole number, for which HINCRBY would fail
local function mend(R, name)
  local newest = name == 'seq' and redis.call('XREVRANGE', k.events(R), '+', '-', 'COUNT', 1)[1]
  redis.call('HSET', k.run(R), name, newest and string.match(newest[1], '^%d+') or '0')
end

-- The fields that this script needs, of which the last ones are counters, and run_of(R, values): their values as a table with numbers as numbers.
-- `store/run_fields.py` replaces this line
local RUN_FIELDS, COUNTERS_FROM, run_of = fields_of_runs(count_of)

-- keys_of(R): the keys that live as long as the run
local function keys_of(R) return {k.run(R), k.facts(R), k.decisions(R), k.events(R), k.journal(R), k.held(R)} end

-- load(R): the record (`run_of`); nil if it does not exist
local function load(R)
  local values = redis.pcall('HMGET', k.run(R), unpack(RUN_FIELDS))
  if values.err then
    if not is_wrong_type(values) then redis.call('HMGET', k.run(R), 'state') end
    local A = aside() -- this run cannot be executed, and its keys must expire
    A.note(k.run(R), 'redis.wrong_type', 'the key of a run record is a ' .. A.type_of(k.run(R)) .. ': the run is skipped')
    for _, key in ipairs(keys_of(R)) do redis.call('PEXPIRE', key, RUN_TTL_MS) end
    return nil
  end
  if not values[1] then return nil end
  local run = run_of(R, values)
  run.life = math.max(run.life, 1) -- also without a valid number: watchers take no event of life 0
  for i = COUNTERS_FROM, #RUN_FIELDS do -- HINCRBY accepts only whole numbers
    local count = values[i]
    if count and (#count > 15 or not string.find(count, '^%d+$')) then mend(R, RUN_FIELDS[i]) end
  end
  return run
end

local function q(text) return cjson.encode(text) end

-- envelope_middle(run): the part that all envelopes of this script have in common, from the ids to the payload
local function envelope_middle(run)
  return ',"run_id":' .. q(run.id) .. ',"session_id":' .. q(run.session) .. ',"agent_id":' .. q(run.agent)
    .. ',"life":' .. run.life .. ',"attempt":' .. run.attempt .. ',"worker":' .. (run.owner ~= '' and q(run.owner) or 'null')
    .. ',"timestamp":"' .. iso(NOW_MS) .. '","payload":'
end

-- envelope(…): the published JSON of an event; `seq` is its number as JSON (null for an event that is not stored)
local function envelope(name, seq, middle, payload, final)
  return '{"name":' .. q(name) .. ',"seq":' .. seq .. middle .. payload .. (final and ',"final":true}' or '}')
end

-- Payloads may be encoded. What is needed of one is in the name of the event, after character 31 (`store/event_items.py`).

-- The events with pieces of a text that is still growing: published, but not stored. By name: how the fields of `reply` begin that keep this text
local LIVE = {['llm.delta'] = '', ['tool.delta'] = 'tool_'}

-- named(item): the name of an event, the call whose text it ends, and the piece of a text that it is
local function named(item)
  if string.byte(item) ~= 31 then return item end
  local _, to, name, offset, chars, length = string.find(item, '^\31(%a+%.delta)\31(%d+)\31(%d+)\31(%d+)\31')
  if to then
    return name, nil, {offset = tonumber(offset), chars = tonumber(chars), call = string.sub(item, to + 1, to + length),
      text = string.sub(item, to + length + 1)}
  end
  local name, call = string.match(item, '^\31([^\31]+)\31(.*)$')
  return name or item, call
end

local KEPT_BYTES = 65536 -- only the beginning of a longer text is kept; the rest is published, and the commit stores all of it
local KEPT_MS = 60000 -- after so long without a piece, the text is dropped: the commit or the next attempt has all of it
local PART_BYTES = 8192 -- a field of a hash cannot be appended to, so the text is kept in parts: a piece copies only the last one

-- forget_fields(key, own): forgets a text that was kept; `own` begins the names of its fields: '' for a reply, `tool_` for a tool's output
local function forget_fields(key, own)
  local names = {own .. 'attempt', own .. 'call', own .. 'chars', own .. 'bytes', own .. 'text', own .. 'at'}
  for n = 1, math.min(count_of(redis.call('HGET', key, own .. 'parts')), KEPT_BYTES / PART_BYTES) do names[#names + 1] = own .. 'text' .. n end
  redis.call('HDEL', key, own .. 'parts', unpack(names))
end

-- begin_text(key, run, own, call, piece): begins a text with its first piece
local function begin_text(key, run, own, call, piece)
  forget_fields(key, own)
  redis.call('HSET', key, own .. 'attempt', digits(run.attempt), own .. 'call', call, own .. 'chars', digits(piece.chars), own .. 'bytes',
    #piece.text, own .. 'parts', 0, own .. 'text', piece.text, own .. 'at', iso(NOW_MS))
end

local NO_TEXT = {chars = 0, text = ''}

-- forget_text(run, call): the event of a complete text replaces what was kept of it for watchers that join
local function forget_text(run, call)
  local key = k.reply(run.id)
  local reply, output = unpack(redis.call('HMGET', key, 'call', 'tool_call'))
  if reply == call then
    if not output then return redis.call('DEL', key) end
    begin_text(key, run, '', '', NO_TEXT) -- every reader expects the fields of a reply
  elseif output == call then
    if not reply or reply == '' then return redis.call('DEL', key) end
    forget_fields(key, 'tool_')
  end
end

-- keep_piece(run, piece, own): adds a piece to the text so far, for watchers that join; offset 0 starts a new text. `own` begins its fields.
-- The text is in the fields `text`, `text1` … `text{parts}`. The previous version keeps and reads `text` only
local function keep_piece(run, piece, own)
  local key = k.reply(run.id)
  if piece.offset == 0 then
    begin_text(key, run, own, piece.call, piece)
    if own ~= '' and redis.call('HEXISTS', key, 'call') == 0 then begin_text(key, run, '', '', NO_TEXT) end
  else
    local attempt, call, chars, bytes, parts = unpack(redis.call('HMGET', key, own .. 'attempt', own .. 'call', own .. 'chars', own .. 'bytes',
      own .. 'parts'))
    if attempt ~= digits(run.attempt) or call ~= piece.call then return end
    bytes, parts = count_of(bytes) + #piece.text, count_of(parts)
    if tonumber(chars) == piece.offset and bytes <= KEPT_BYTES then
      local text = redis.call('HGET', key, own .. (parts == 0 and 'text' or 'text' .. parts)) or ''
      if #text >= PART_BYTES then parts, text = parts + 1, '' end
      redis.call('HSET', key, own .. 'chars', digits(piece.offset + piece.chars), own .. 'bytes', bytes, own .. 'parts', parts,
        own .. (parts == 0 and 'text' or 'text' .. parts), text .. piece.text, own .. 'at', iso(NOW_MS))
    end
  end
  redis.call('PEXPIRE', key, KEPT_MS)
end

-- add_again(run, seq, left, entry…): adds an entry that Redis has refused again, with a valid number; `left` entries follow it. Returns the number
local function add_again(run, seq, left, ...)
  local stream = k.events(run.id)
  local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  local top = newest and tonumber(string.match(newest[1], '^%d+')) or 0
  if top >= seq then -- the counter in the record does not match the stream
    if top + left + 1 >= MOST then
      aside().move(stream)
    else
      seq = top + 1
      redis.call('HSET', k.run(run.id), 'seq', digits(seq + left))
    end
  end
  redis.call('XADD', stream, 'MAXLEN', '~', EVENTS_MAXLEN, digits(seq) .. '-0', ...)
  return seq
end

-- add_entry(stream, left, number, entry…): adds an entry; returns its id, or the error of Redis. The last entry of a batch (`left` entries follow it)
-- shortens the stream
local function add_entry(stream, left, number, ...)
  if left > 0 then return redis.pcall('XADD', stream, number .. '-0', ...) end
  return redis.pcall('XADD', stream, 'MAXLEN', '~', EVENTS_MAXLEN, number .. '-0', ...)
end

-- append(run, events): events = {name, payload, name, payload, …}; gives each event its seq, stores it and publishes it.
-- The published envelope is complete. The stored entry omits what readers of the stream know: the ids, and `seq`, which is the id of the entry.
-- All entries have the same fields in the same order, so that Redis stores the field names only once.
-- A piece of a text (see LIVE) is published, but it is not stored and has no seq.
local function append(run, events, final)
  if #events == 0 then return end
  local names, ended_calls, pieces, left, ended_at = {}, {}, {}, 0, {}
  for i = 1, #events, 2 do
    local name, ended_call, piece = named(events[i])
    names[i], ended_calls[i], pieces[i] = name, ended_call, piece
    if ended_call then ended_at[ended_call] = i end
    if not LIVE[name] then left = left + 1 end
  end
  local seq = left > 0 and redis.call('HINCRBY', k.run(run.id), 'seq', left) - left
  local stream, channel = k.events(run.id), k.channel(run.agent, run.session, run.id)
  local now, life, attempt = digits(NOW_MS), digits(run.life), digits(run.attempt)
  local middle = envelope_middle(run)
  for i = 1, #events, 2 do
    local name, payload = names[i], events[i + 1]
    if LIVE[name] then
      local piece = pieces[i]
      if piece and (ended_at[piece.call] or 0) < i then keep_piece(run, piece, LIVE[name]) end -- else nobody could read it before its end
      redis.call('PUBLISH', channel, envelope(name, 'null', middle, payload))
    else
      if ended_calls[i] then forget_text(run, ended_calls[i]) end
      seq, left = seq + 1, left - 1
      local is_final = final and i == #events - 1
      local number = digits(seq)
      local stored = add_entry(stream, left, number, 'name', name, 'life', life, 'attempt', attempt, 'worker', run.owner, 'at', now,
        'final', is_final and '1' or '0', 'payload', payload)
      if type(stored) ~= 'string' then
        seq = add_again(run, seq, left, 'name', name, 'life', life, 'attempt', attempt, 'worker', run.owner, 'at', now,
          'final', is_final and '1' or '0', 'payload', payload)
        number = digits(seq)
      end
      redis.call('PUBLISH', channel, envelope(name, number, middle, payload, is_final))
    end
  end
end

-- says_so_itself(run): whether the run is to end as interrupted, with a turn in the transcript that says so. Only a worker can write this turn,
-- because a script reads no texts: a worker claims the run, replays it, and ends it at the first call that is not recorded
local function says_so_itself(run) return run.cancel == '1' and run.interrupted == 'interrupt' end

-- next_fence(run, nonce): the next fence for a run whose owner changes: the token increases, the nonce is that of the claim or empty
local function next_fence(run, nonce)
  local token = tonumber(string.match(run.fence, '^(%d+):')) or 0
  return digits(token + 1) .. ':' .. (nonce or '')
end

-- is_live(run, F): whether the owner with this fence may write; false also without a record
local function is_live(run, F)
  if not run or run.fence ~= F or run.state ~= STATE.running then return false end
  return redis.call('HGET', k.session(run.session), 'holder') == run.id
end

-- live(R, F): the record if the owner with this fence may write, else nil
local function live(R, F)
  local run = load(R)
  return is_live(run, F) and run or nil
end

-- wake_of(run): marks a wake-up as sent and returns it (`Wake`). Callers set `is_ended` if the run is over
local function wake_of(run)
  redis.call('ZADD', k.sent(run.queue), digits(NOW_US), run.id)
  return {run_id = run.id, queue = run.queue, sent_us = NOW_US, agent_id = run.agent, session_id = run.session, attempt = run.attempt,
    step = run.steps, canvas = run.canvas, is_ended = false}
end

-- leave(run): removes the run from the sets of its owner, and adds the time of this attempt to active_ms
local function leave(run)
  if run.owner == '' then return end
  local since = tonumber(run.claimed) or NOW_MS
  redis.call('HINCRBY', k.run(run.id), 'active_ms', digits(since > 0 and since < NOW_MS and NOW_MS - since or 0))
  redis.call('SREM', k.worker_runs(run.owner), run.id)
  redis.call('SREM', k.worker_box(run.owner), run.id)
  if run.suspicion ~= '' or run.stuck >= 2 then redis.call('SREM', k.suspects(run.owner), run.id) end
  -- The single suspect of a worker of the previous version
  if run.stuck >= 2 and redis.call('GET', k.worker_suspect(run.owner)) == run.id then redis.call('DEL', k.worker_suspect(run.owner)) end
end
