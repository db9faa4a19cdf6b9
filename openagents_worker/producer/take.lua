-- Takes up to `most` messages from lists in kombu's format, the first list first. KEYS: unacked, its index, the lists. ARGV: most, now (s).
-- A message behind which no run stands is noted as unacknowledged, as kombu does it, but in the same step: it cannot be lost in between.
-- Returns list, message, the tag under which it is noted ('' for one that is not), list, message, tag …
local unacked, index, most, now = KEYS[1], KEYS[2], tonumber(ARGV[1]), ARGV[2]

local function note(item)
  local message = cjson.decode(item)
  local properties = message.properties
  local tag, where = properties.delivery_tag, properties.delivery_info
  if type(tag) ~= 'string' or type(message.body) ~= 'string' then return '' end
  redis.call('ZADD', index, now, tag)
  redis.call('HSET', unacked, tag, '[' .. item .. ',' .. cjson.encode(where.exchange) .. ',' .. cjson.encode(where.routing_key) .. ']')
  return tag
end

local taken = {}
for i = 3, #KEYS do
  local left = most - #taken / 3
  local items = left > 0 and redis.pcall('RPOP', KEYS[i], left) or {}
  for _, item in ipairs(items.err and {} or items) do -- whoever waits for a message learns of a key that is not a list
    taken[#taken + 1] = KEYS[i]
    taken[#taken + 1] = item
    local ok, tag
    if not string.find(item, '"wake_us"', 1, true) then ok, tag = pcall(note, item) end -- whoever reads it says what is wrong with it
    taken[#taken + 1] = ok and tag or ''
  end
end
return taken
