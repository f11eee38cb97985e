#include "tokenizer/assign.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace genrec::tokenizer {
namespace {

// The cheapest assignment of each row to a column of its own, rows <= columns: shortest
// augmenting paths (Jonker and Volgenant, 1987), rows in order.  cost [rows, columns];
// returns the column of each row.
std::vector<int64_t> cheapest(const std::vector<double>& cost, int64_t rows, int64_t columns) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  std::vector<double> row_price(at(rows), 0), column_price(at(columns), 0);
  std::vector<int64_t> row_of(at(columns), -1), column_of(at(rows), -1), before(at(columns));
  std::vector<double> shortest(at(columns));
  std::vector<char> reached(at(columns));
  for (int64_t start = 0; start < rows; ++start) {
    std::fill(shortest.begin(), shortest.end(), kInfinity);
    std::fill(reached.begin(), reached.end(), char{0});
    std::vector<int64_t> path_columns;
    double length = 0;
    int64_t row = start, column = -1;
    while (true) {
      int64_t next = -1;
      for (int64_t c = 0; c < columns; ++c) {
        if (reached[at(c)]) continue;
        const double along =
            length + cost[at(row * columns + c)] - row_price[at(row)] - column_price[at(c)];
        if (along < shortest[at(c)]) shortest[at(c)] = along, before[at(c)] = row;
        // Of columns alike, a free one ends the search.
        if (next < 0 || shortest[at(c)] < shortest[at(next)] ||
            (shortest[at(c)] == shortest[at(next)] && row_of[at(c)] < 0 && row_of[at(next)] >= 0))
          next = c;
      }
      length = shortest[at(next)];
      reached[at(next)] = 1;
      path_columns.push_back(next);
      column = next;
      if (row_of[at(column)] < 0) break;
      row = row_of[at(column)];
    }
    row_price[at(start)] += length;
    for (int64_t c : path_columns) {
      if (c == column) continue;
      row_price[at(row_of[at(c)])] += length - shortest[at(c)];
      column_price[at(c)] -= length - shortest[at(c)];
    }
    while (true) {
      const int64_t from = before[at(column)];
      row_of[at(column)] = from;
      std::swap(column_of[at(from)], column);
      if (from == start) break;
    }
  }
  return column_of;
}

// Items beyond a code's room to the lowest codes that have some.  Of n items those are below 2 n,
// however large other codes may be.
void to_lowest(const AssignArgs& a, int64_t begin, int64_t end) {
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  std::vector<int64_t> count(at(std::min(a.codebook_size, 2 * (end - begin))), 0);
  const auto low = static_cast<int64_t>(count.size());
  for (int64_t i = begin; i < end; ++i)
    if (a.last[a.items[i]] < low) ++count[at(a.last[a.items[i]])];
  int64_t room = 0, code = -1, kept = 0;
  for (int64_t i = begin; i < end; ++i) {
    int64_t& last = a.last[a.items[i]];
    kept = last == code ? kept + 1 : 1;
    code = last;
    if (kept <= a.capacity) continue;
    while (count[at(room)] >= a.capacity) ++room;
    ++count[at(room)];
    last = room;
  }
}

void assign_group(const AssignArgs& a, int64_t begin, int64_t end) {
  if (a.distances == nullptr) return to_lowest(a, begin, end);
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  std::vector<int64_t> count(at(a.codebook_size), 0);
  for (int64_t i = begin; i < end; ++i) ++count[at(a.last[a.items[i]])];

  // The items of overfull codes, and what they can have: the room of their own codes,
  // all of which is taken, and what others have left.
  std::vector<int64_t> rows, columns;
  for (int64_t i = begin; i < end; ++i)
    if (count[at(a.last[a.items[i]])] > a.capacity) rows.push_back(i);
  if (rows.empty()) return;

  for (int64_t code = 0; code < a.codebook_size; ++code) {
    const int64_t places = count[at(code)] > a.capacity ? a.capacity : a.capacity - count[at(code)];
    // More places than there are items to take them would only cost time.
    columns.insert(columns.end(), at(std::min(places, static_cast<int64_t>(rows.size()))), code);
  }
  double least = std::numeric_limits<double>::infinity(), most = -least;
  for (int64_t i : rows)
    for (int64_t code = 0; code < a.codebook_size; ++code) {
      least = std::min(least, a.distances[i * a.codebook_size + code]);
      most = std::max(most, a.distances[i * a.codebook_size + code]);
    }
  const auto R = static_cast<int64_t>(rows.size()), C = static_cast<int64_t>(columns.size());
  // Costs lie in [0, 1], so keeping one item more is worth any difference of the others.
  const double scale = most > least ? 1 / (most - least) : 0, leaving = static_cast<double>(R + 1);
  std::vector<double> cost(at(R * C));
  for (int64_t r = 0; r < R; ++r) {
    const int64_t own = a.last[a.items[rows[at(r)]]];
    for (int64_t c = 0; c < C; ++c) {
      const int64_t code = columns[at(c)];
      double& here = cost[at(r * C + c)];
      if (code != own && count[at(code)] > a.capacity)
        here = 3 * leaving * leaving;  // another overfull code has no room for it
      else
        here = scale * (a.distances[rows[at(r)] * a.codebook_size + code] - least) +
               (code == own ? 0 : leaving);
    }
  }
  const std::vector<int64_t> chosen = cheapest(cost, R, C);
  for (int64_t r = 0; r < R; ++r) a.last[a.items[rows[at(r)]]] = columns[at(chosen[at(r)])];
}

}  // namespace

void assign_last_codes(const AssignArgs& a, int64_t first_group, int64_t last_group) {
  for (int64_t g = first_group; g < last_group; ++g) assign_group(a, a.begin[g], a.begin[g + 1]);
}

}  // namespace genrec::tokenizer
