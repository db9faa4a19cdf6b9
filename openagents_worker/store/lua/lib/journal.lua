-- records(key, at, length, page_bytes, least): the records from `at` on that fit into a page, but at least `least` of them
local function records(key, at, length, page_bytes, least)
  local page, bytes = {}, 0
  while at < length do
    local chunk = redis.call('LRANGE', key, at, at + 15)
    for _, record in ipairs(chunk) do
      if bytes + #record > page_bytes and #page >= least then return page end
      page[#page + 1] = record
      bytes = bytes + #record
    end
    at = at + 16
  end
  return page
end
